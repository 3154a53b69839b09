"""Blocks of a convolution's weight removed, filters x input channels: the kept ones, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from liveweight._packing import csr_pattern
from liveweight.formats import pattern
from liveweight.formats.block import cheapest, check_block, grid
from liveweight.formats.schedule import check_schedule, make_schedule

_OWNER = "BlockKernels"
_CANDIDATES = ((64, 64), (64, 32), (64, 16), (32, 32), (32, 16), (16, 16))
_SIDES = (128, 64, 32, 16)  # that have a kernel on a GPU
# What a stored entry costs on a GPU beside others, where pixels are many: a step of k reads 128
# pixels and bo filters for 128 bo products, and these reads are its limit. A model, not measured.
GPU_COSTS = MappingProxyType({(bo, bc): 1 / 128 + 1 / bo for bo in _SIDES for bc in _SIDES})


@dataclasses.dataclass(frozen=True, eq=False)
class BlockKernels(pattern.PackedWeight):
    """A convolution's weight W as a list of kept blocks of bo filters x bc input channels.

    W[r * bo + o, columns[b] * bc + c, y, x] = values[b, y * kw + x, c, o] for row_offsets[r] <= b <
    row_offsets[r + 1], zero elsewhere: all taps of a kept block are kept. Blocks count channels
    inside a group, as the weight does. Where bo or bc does not divide its side of the weight, the
    last blocks are padded with zeros.

    values       [kept, kh * kw, bc, bo]  floating point; a row of blocks is one matrix, bo wide
    row_offsets  [ceil(Cout / bo) + 1]    int32, starts at 0, never decreases, ends at kept
    columns      [kept]                   int32 in [0, ceil(Cin / groups / bc)), strictly increasing
                                          inside a row
    shape        (Cout, Cin / groups, kh, kw)
    schedule     [schedule.make_schedule] int32, the order of work on a GPU; None: made here

    The constructor stores what it is given; ``validate`` checks it.
    """

    name: ClassVar[str] = "block"

    values: Tensor
    row_offsets: Tensor
    columns: Tensor
    shape: tuple[int, int, int, int]
    schedule: Tensor | None = None

    def __post_init__(self) -> None:
        if self.schedule is None and len(self.shape) == 4 and self.values.dim() == 4:
            width = grid(self.shape[:2], self.block)[1]
            made = make_schedule(self.row_offsets, self.columns, width)
            object.__setattr__(self, "schedule", made)

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None = None, *, block: tuple[int, int] = (16, 16)
    ) -> BlockKernels:
        """Keep the blocks (bo, bc) of weight [Cout, Cin/groups, kh, kw] that hold any non-zero.

        mask bool says what is kept instead: whole kernels [Cout, Cin/groups], or single entries
        (shape of weight); a block with any of them is stored, its other entries become zero.
        -0.0 is zero; values never change. Under groups > 1 a block must not cross groups: bo has to
        divide Cout / groups, which block_conv2d checks.
        Raises TypeError (dtypes) and ValueError (shapes, sizes of blocks).
        """
        pattern.check_dense(_OWNER, weight, 4)
        bo, bc = check_block(block, _OWNER)
        weight = weight.detach()
        shape = tuple(weight.shape)
        if mask is None:
            mask = weight != 0
        else:
            pattern.check_mask(_OWNER, mask, (shape[:2], shape))
            mask = mask if mask.dim() == 4 else mask[:, :, None, None].expand(shape)
            weight = torch.where(mask, weight, 0)
        kept = _kept_blocks(mask, bo, bc)
        row_offsets, columns = csr_pattern(kept)
        return cls(_cut(weight, bo, bc)[kept].contiguous(), row_offsets, columns, shape)

    @staticmethod
    def best_block(
        weight: Tensor,
        candidates: Iterable[tuple[int, int]] | Mapping[tuple[int, int], float] | None = None,
        *,
        groups: int = 1,
    ) -> tuple[tuple[int, int], float]:
        """Return the block that stores the fewest entries of weight, the first of equals.

        candidates  blocks, or what a stored entry costs in blocks of that size: then the block of
                    the least cost, of costs within a quarter the one with the fewest entries.
                    Default: six blocks for a weight on a CPU; on a GPU GPU_COSTS, which estimates
                    the cost for many pixels
        groups      of the convolution; candidates whose panels would cross them are left out

        The second item is the fraction of stored entries that are not zero, in [0, 1]; 1.0 where
        nothing is stored.
        Raises TypeError (dtypes) and ValueError (shapes, sizes of blocks, no candidate that fits).
        """
        pattern.check_dense(_OWNER, weight, 4)
        mask = weight.detach() != 0
        if candidates is None:
            candidates = GPU_COSTS if weight.is_cuda else _CANDIDATES
        costs = candidates if isinstance(candidates, Mapping) else dict.fromkeys(candidates, 1.0)
        taps, stored = weight.shape[2] * weight.shape[3], {}
        for block in costs:
            bo, bc = check_block(block, _OWNER)
            if groups == 1 or weight.shape[0] // groups % bo == 0:
                stored[bo, bc] = int(_kept_blocks(mask, bo, bc).sum()) * bo * bc * taps
        if not stored:
            raise ValueError(
                f"{_OWNER}: expected at least one candidate whose rows divide "
                f"{weight.shape[0]} filters / {groups} groups"
            )
        best = cheapest(stored, costs)
        return best, int(mask.sum()) / stored[best] if stored[best] else 1.0

    @property
    def block(self) -> tuple[int, int]:
        """Filters and channels of a block: (bo, bc)."""
        return self.values.shape[3], self.values.shape[2]

    @property
    def density(self) -> float:
        """Fraction of blocks kept, in [0, 1]; 0 where there are none."""
        rows, width = grid(self.shape[:2], self.block)
        return self.columns.numel() / (rows * width) if rows * width else 0.0

    def to_dense(self) -> Tensor:
        """Return W [Cout, Cin/groups, kh, kw], a new tensor, differentiable in values."""
        kept, taps, bc, bo = self.values.shape
        rows, width = grid(self.shape[:2], (bo, bc))
        index = pattern.expand_rows(self.row_offsets, kept), self.columns.long()
        dense = self.values.new_zeros(rows, width, taps, bc, bo).index_put(index, self.values)
        dense = dense.permute(0, 4, 1, 3, 2).reshape(rows * bo, width * bc, *self.shape[2:])
        return dense[: self.shape[0], : self.shape[1]].contiguous()

    def validate(self) -> BlockKernels:
        """Return self if every invariant of the class holds; raise TypeError or ValueError if not.

        Ops do not repeat these checks: columns out of range there would read foreign memory.
        """
        if len(self.shape) != 4 or min(self.shape) < 0:
            raise ValueError(
                f"{_OWNER}: shape must be (Cout, Cin/groups, kh, kw), got {tuple(self.shape)}"
            )
        if self.values.dim() != 4:
            got = tuple(self.values.shape)
            raise ValueError(f"{_OWNER}: values must be [kept, kh * kw, bc, bo], got {got}")
        block = check_block(self.block, _OWNER)
        size = grid(self.shape[:2], block)
        names = ("row_offsets", "columns")
        pattern.check_pattern(_OWNER, names, self.row_offsets, self.columns, size)
        wanted = (self.columns.numel(), self.shape[2] * self.shape[3], block[1], block[0])
        pattern.check_values(_OWNER, self.values, wanted, self.columns)
        check_schedule(_OWNER, self.schedule, self.row_offsets, self.columns, size[1])
        if int(self.to_dense().count_nonzero()) != int(self.values.count_nonzero()):
            raise ValueError(f"{_OWNER}: values must be zero outside of the shape {self.shape}")
        return self

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.row_offsets, self.columns, self.schedule


def _kept_blocks(mask: Tensor, bo: int, bc: int) -> Tensor:
    """Return which blocks of a mask [Cout, C, kh, kw] hold anything: bool [rows, width]."""
    return _cut(mask, bo, bc).flatten(2).any(2)


def _cut(weight: Tensor, bo: int, bc: int) -> Tensor:
    """Return weight [Cout, C, kh, kw], padded with zeros, as blocks [rows, width, taps, bc, bo]."""
    rows, width = grid(tuple(weight.shape[:2]), (bo, bc))
    taps = weight.shape[2] * weight.shape[3]
    pad = (0, 0, 0, width * bc - weight.shape[1], 0, rows * bo - weight.shape[0])
    flat = functional.pad(weight.reshape(*weight.shape[:2], taps), pad)
    return flat.reshape(rows, bo, width, bc, taps).permute(0, 2, 4, 3, 1)
