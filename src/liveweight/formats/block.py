"""Whole blocks of a Linear weight removed: the kept blocks, row of blocks after row of blocks."""

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
from liveweight.formats.schedule import check_schedule, make_schedule

_OWNER = "Block"
_MOST = 128
_CANDIDATES = ((32, 32), (16, 16), (8, 8), (16, 1))
_SIDES = (128, 64, 32, 16)  # that have a kernel on a GPU
# What a stored entry costs on a GPU beside others, where samples are many: a step of k reads 256
# samples and bh rows for 256 bh products, and these reads are its limit. Narrow blocks need x
# turned and their columns looked up one by one. A model, not measured.
_NARROW = (8, 4, 2, 1)
GPU_COSTS = MappingProxyType(
    {(bh, bw): 1 / 256 + 1 / bh for bh in _SIDES for bw in _SIDES}
    | {(bh, bw): 1.15 * (1 / 256 + 1 / bh) for bh in _SIDES for bw in _NARROW}
)
_NEAR = 1.25  # costs that count as equal: more zeros are stored only for a clear gain


@dataclasses.dataclass(frozen=True, eq=False)
class Block(pattern.PackedWeight):
    """A linear weight W of shape (N, K) as a list of kept blocks of bh rows x bw columns.

    W[r * bh + i, columns[b] * bw + j] = values[b, j, i] for row_offsets[r] <= b <
    row_offsets[r + 1], zero elsewhere. A block stores column after column: rows of W lie side by
    side. Where bh or bw does not divide N or K, the last blocks are padded with zeros.

    values       [kept, bw, bh]      floating point
    row_offsets  [ceil(N / bh) + 1]  int32, starts at 0, never decreases, ends at kept
    columns      [kept]              int32 in [0, ceil(K / bw)), strictly increasing inside a row
    shape        (N, K) = (out_features, in_features)
    schedule     int32               formats.schedule.make_schedule of the two; None fills it in

    The constructor stores what it is given; ``validate`` checks it.
    """

    name: ClassVar[str] = "block"

    values: Tensor
    row_offsets: Tensor
    columns: Tensor
    shape: tuple[int, int]
    schedule: Tensor | None = None

    def __post_init__(self) -> None:
        if self.schedule is None:
            width = grid(self.shape, self.block)[1]
            made = make_schedule(self.row_offsets, self.columns, width)
            object.__setattr__(self, "schedule", made)

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None = None, *, block: tuple[int, int] = (16, 16)
    ) -> Block:
        """Keep the blocks (bh, bw) of weight [N, K] that hold any non-zero (-0.0 is zero).

        mask [N, K] bool says which entries are kept instead: a block with any of them is stored,
        its other entries become zero. Values never change.
        Raises TypeError (dtypes) and ValueError (shapes, sizes of blocks).
        """
        pattern.check_dense(_OWNER, weight, 2)
        bh, bw = check_block(block)
        weight = weight.detach()
        shape = tuple(weight.shape)
        if mask is None:
            mask = weight != 0
        else:
            pattern.check_mask(_OWNER, mask, (shape,))
            weight = torch.where(mask, weight, 0)
        kept = cut_blocks(mask, bh, bw).flatten(2).any(2)
        row_offsets, columns = csr_pattern(kept)
        return cls(cut_blocks(weight, bh, bw)[kept].contiguous(), row_offsets, columns, shape)

    @staticmethod
    def best_block(
        weight: Tensor,
        candidates: Iterable[tuple[int, int]] | Mapping[tuple[int, int], float] | None = None,
    ) -> tuple[tuple[int, int], float]:
        """Return the block that stores the fewest entries of weight [N, K], the first of equals.

        candidates  blocks, or what a stored entry costs in blocks of that size: then the block of
                    the least cost, of costs within a quarter the one with the fewest entries.
                    Default: four blocks for a weight on a CPU; on a GPU GPU_COSTS, which estimates
                    the cost for many samples (for few, the fewest entries are the fastest)

        The second item is the fraction of stored entries that are not zero, in [0, 1]; 1.0 where
        nothing is stored. Raises TypeError (dtypes) and ValueError (shapes, sizes of blocks).
        """
        pattern.check_dense(_OWNER, weight, 2)
        mask = weight.detach() != 0
        if candidates is None:
            candidates = GPU_COSTS if weight.is_cuda else _CANDIDATES
        costs = candidates if isinstance(candidates, Mapping) else dict.fromkeys(candidates, 1.0)
        stored = {}
        for block in costs:
            bh, bw = check_block(block)
            stored[bh, bw] = int(cut_blocks(mask, bh, bw).flatten(2).any(2).sum()) * bh * bw
        if not stored:
            raise ValueError(f"{_OWNER}: expected at least one candidate")
        best = cheapest(stored, costs)
        return best, int(mask.sum()) / stored[best] if stored[best] else 1.0

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block: (bh, bw)."""
        return self.values.shape[2], self.values.shape[1]

    @property
    def density(self) -> float:
        """Fraction of blocks kept, in [0, 1]; 0 where there are none."""
        rows, columns = grid(self.shape, self.block)
        return self.columns.numel() / (rows * columns) if rows * columns else 0.0

    def to_dense(self) -> Tensor:
        """Return W [N, K], a new tensor."""
        return blocks_to_dense(self.values, self.row_offsets, self.columns, self.shape)

    def validate(self) -> Block:
        """Return self if every invariant of the class holds; raise TypeError or ValueError if not.

        Ops do not repeat these checks: columns out of range there would read foreign memory.
        """
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise ValueError(f"{_OWNER}: shape must be (N, K), got {tuple(self.shape)}")
        if self.values.dim() != 3:
            raise ValueError(
                f"{_OWNER}: values must be [kept, bw, bh], got {tuple(self.values.shape)}"
            )
        block = check_block(self.block)
        names = ("row_offsets", "columns")
        size = grid(self.shape, block)
        pattern.check_pattern(_OWNER, names, self.row_offsets, self.columns, size)
        wanted = (self.columns.numel(), block[1], block[0])
        pattern.check_values(_OWNER, self.values, wanted, self.columns)
        if int(self.to_dense().count_nonzero()) != int(self.values.count_nonzero()):
            raise ValueError(f"{_OWNER}: values must be zero outside of the shape {self.shape}")
        check_schedule(_OWNER, self.schedule, self.row_offsets, self.columns, size[1])
        return self

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.row_offsets, self.columns, self.schedule


def check_block(block: tuple[int, int], owner: str = _OWNER) -> tuple[int, int]:
    """Return (bh, bw); raise TypeError or ValueError unless it is two integers in [1, 128]."""
    sides = tuple(block) if isinstance(block, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) for s in sides):
        raise TypeError(f"{owner}: block must be two integers (bh, bw), got {block!r}")
    if not all(1 <= s <= _MOST for s in sides):
        raise ValueError(f"{owner}: sides of a block must be in [1, {_MOST}], got {block!r}")
    return sides


def cheapest(
    stored: Mapping[tuple[int, int], int], costs: Mapping[tuple[int, int], float]
) -> tuple[int, int]:
    """Return the block of the least stored entries times cost; of near ones the fewest entries."""
    work = {block: entries * costs[block] for block, entries in stored.items()}
    near = [block for block in stored if work[block] <= _NEAR * min(work.values())]
    return min(near, key=stored.__getitem__)


def grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Return how many rows and columns of blocks cover the shape."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def blocks_to_dense(
    values: Tensor, row_offsets: Tensor, columns: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Return W [N, K] for the parts of a Block, differentiable in values."""
    kept, bw, bh = values.shape
    rows, width = grid(shape, (bh, bw))
    index = pattern.expand_rows(row_offsets, kept), columns.long()
    dense = values.new_zeros(rows, width, bw, bh).index_put(index, values)
    return dense.permute(0, 3, 1, 2).reshape(rows * bh, width * bw)[: shape[0], : shape[1]]


def cut_blocks(weight: Tensor, bh: int, bw: int) -> Tensor:
    """Return weight [N, K], padded with zeros, as all its blocks [rows, columns, bw, bh]."""
    rows, width = grid(tuple(weight.shape), (bh, bw))
    pad = (0, width * bw - weight.shape[1], 0, rows * bh - weight.shape[0])
    return functional.pad(weight, pad).reshape(rows, bh, width, bw).permute(0, 2, 3, 1)
