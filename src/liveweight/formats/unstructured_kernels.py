"""Single weights of a Conv2d layer removed anywhere inside its kernels: tiles of short runs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from liveweight.formats import pattern

_OWNER = "UnstructuredKernels"
_ROWS = 64  # filters that share a tile: enough to use it often, few enough to share among threads
_LINES = 480  # vectors of input that a tile reads for 2 x 4 outputs: 30 KB of the first-level cache


@dataclasses.dataclass(frozen=True, eq=False)
class UnstructuredKernels(pattern.PackedWeight):
    """A convolution weight W of shape (Cout, Cin / groups, kh, kw) as tiles of single entries.

    tile = (R, T): R filters x T input channels. Group block * ceil(Cin / groups / T) + part holds
    the entries of filters block * R ... and channels part * T ...; only filters with entries there
    appear, as segments, the longest first (so that loops over them repeat their length):
    W[block * R + row, part * T + column // taps, column % taps] = value, taps = kh * kw.

    values    [nnz]       floating point, group after group, segment after segment
    columns   [nnz]       uint8 (int16 where T * taps > 256): rising inside a segment
    segments  [S, 2]      dtype of columns: row in the block, number of entries - 1
    offsets   [G + 1, 2]  int32: first entry and first segment of each group
    shape     (Cout, Cin / groups, kh, kw)
    tile      (R, T), R <= 256

    The constructor stores what it is given; ``validate`` checks it.
    """

    name: ClassVar[str] = "unstructured"

    values: Tensor
    columns: Tensor
    segments: Tensor
    offsets: Tensor
    shape: tuple[int, int, int, int]
    tile: tuple[int, int]

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None = None, *, tile: tuple[int, int] | None = None
    ) -> UnstructuredKernels:
        """Keep the entries of weight [Cout, Cin/groups, kh, kw] that are not zero (-0.0 is).

        mask bool, shape of weight, says what is kept instead, zeros included; values never change.
        tile (R, T) overrides the size that suits kernels of this shape.
        Raises TypeError (dtypes) and ValueError (shapes, sizes).
        """
        pattern.check_dense(_OWNER, weight, 4)
        shape = tuple(weight.shape)
        if mask is None:
            mask = weight != 0
        pattern.check_mask(_OWNER, mask, (shape,))
        tile = default_tile(shape) if tile is None else check_tile(tile, shape)
        entry, *index = _pack(mask, tile)
        return cls(weight.detach().reshape(-1)[entry], *index, shape, tile)

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Return filter and column (channel * taps + tap) of each entry: int64 [nnz] each."""
        parts = group_count(self.shape, self.tile)[1]
        groups = pattern.expand_rows(self.offsets[:, 1], self.segments.shape[0])
        counts = self.segments[:, 1].long() + 1
        rows = groups // max(parts, 1) * self.tile[0] + self.segments[:, 0]
        first = groups % max(parts, 1) * (self.tile[1] * self.shape[2] * self.shape[3])
        both = torch.stack((rows, first))
        both = torch.repeat_interleave(both, counts, 1, output_size=self.columns.numel())
        return both[0], both[1] + self.columns

    def to_dense(self) -> Tensor:
        """Return W [Cout, Cin/groups, kh, kw], a new tensor."""
        dense = self.values.new_zeros(
            (self.shape[0], self.shape[1] * self.shape[2] * self.shape[3])
        )
        return dense.index_put(self.coordinates(), self.values).reshape(self.shape)

    @property
    def density(self) -> float:
        """Fraction of entries kept, in [0, 1]; 0 where there are none."""
        total = self.shape[0] * self.shape[1] * self.shape[2] * self.shape[3]
        return self.values.numel() / total if total else 0.0

    def validate(self) -> UnstructuredKernels:
        """Return self if every invariant of the class holds; raise TypeError or ValueError if not.

        Ops do not repeat these checks: columns out of range there would read foreign memory.
        """
        if len(self.shape) != 4 or min(self.shape) < 0:
            raise ValueError(
                f"{_OWNER}: shape must be (Cout, Cin/groups, kh, kw), got {tuple(self.shape)}"
            )
        check_tile(self.tile, self.shape)
        self._check_tensors()
        self._check_offsets()
        self._check_segments()
        return self

    def _check_tensors(self) -> None:
        taps = self.shape[2] * self.shape[3]
        dtype = _index_dtype(self.tile, taps)
        wanted = {"columns": (dtype, 1), "segments": (dtype, 2), "offsets": (torch.int32, 2)}
        for name, (kind, dim) in wanted.items():
            index = getattr(self, name)
            if index.dtype != kind:
                got = str(index.dtype).removeprefix("torch.")
                kind = str(kind).removeprefix("torch.")
                raise TypeError(f"{_OWNER}: {name} must be {kind}, got {got}")
            if index.dim() != dim or (dim == 2 and index.shape[1] != 2):
                shape = "[nnz]" if dim == 1 else "[n, 2]"
                raise ValueError(
                    f"{_OWNER}: {name} must have shape {shape}, got {tuple(index.shape)}"
                )
            if index.device != self.columns.device:
                raise ValueError(
                    f"{_OWNER}: {name} on {index.device}, columns on {self.columns.device}"
                )
        pattern.check_values(_OWNER, self.values, (self.columns.numel(),), self.columns)

    def _check_offsets(self) -> None:
        blocks, parts = group_count(self.shape, self.tile)
        if self.offsets.shape[0] != blocks * parts + 1:
            raise ValueError(
                f"{_OWNER}: expected {blocks * parts + 1} offsets, got {self.offsets.shape[0]}"
            )
        last = [self.columns.numel(), self.segments.shape[0]]
        if self.offsets[0].any() or self.offsets[-1].tolist() != last:
            raise ValueError(
                f"{_OWNER}: offsets must go from [0, 0] to {last}, the numbers of columns and "
                f"segments, got {self.offsets[0].tolist()} to {self.offsets[-1].tolist()}"
            )
        if (self.offsets[1:] < self.offsets[:-1]).any():
            raise ValueError(f"{_OWNER}: offsets must not decrease")

    def _check_segments(self) -> None:
        (filters, width), (rows, channels) = (self.shape[0], self.shape[1]), self.tile
        taps = self.shape[2] * self.shape[3]
        parts = group_count(self.shape, self.tile)[1]
        groups = pattern.expand_rows(self.offsets[:, 1], self.segments.shape[0])
        row, counts = self.segments[:, 0].long(), self.segments[:, 1].long() + 1
        room = (filters - groups // max(parts, 1) * rows).clamp(max=rows)
        if ((row < 0) | (row >= room)).any():
            raise ValueError(f"{_OWNER}: segments name a row outside their block of filters")
        if torch.unique(groups * rows + row).numel() != row.numel():
            raise ValueError(f"{_OWNER}: segments name a row twice in a group")
        firsts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        if (counts < 1).any() or not torch.equal(
            firsts[self.offsets[:, 1].long()], self.offsets[:, 0].long()
        ):
            raise ValueError(f"{_OWNER}: segments' numbers of entries do not add up to offsets")
        same = groups[1:] == groups[:-1]
        if (same & (counts[1:] > counts[:-1])).any():
            raise ValueError(f"{_OWNER}: segments must not grow inside a group")
        part = (groups % max(parts, 1)).repeat_interleave(counts)
        columns = self.columns.long()
        outside = (columns < 0) | (columns >= (width - part * channels).clamp(max=channels) * taps)
        if outside.any():
            got = int(columns[outside][0])
            raise ValueError(f"{_OWNER}: columns must lie in their tile, got {got}")
        segment = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
        if ((segment[1:] == segment[:-1]) & (columns[1:] <= columns[:-1])).any():
            raise ValueError(f"{_OWNER}: columns must increase strictly inside a segment")

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.segments, self.offsets, self.columns


def default_tile(shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """Return the (filters, channels) of a tile for a weight of this shape."""
    _, channels, height, width = shape
    lines = (height + 1) * (width + 3)
    fitting = min(_LINES // max(lines, 1), 256 // max(height * width, 1), channels)
    return _ROWS, max(fitting, 1)


def check_tile(tile: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, int]:
    """Return tile if it is two whole numbers whose indices fit; raise ValueError otherwise."""
    whole = isinstance(tile, (tuple, list)) and all(isinstance(v, int) for v in tile)
    if not whole or len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"{_OWNER}: tile must be two whole numbers >= 1, got {tile!r}")
    columns = tile[1] * shape[2] * shape[3]
    if tile[0] > 256 or columns > 2**15:
        raise ValueError(
            f"{_OWNER}: tile may have 256 filters and {2**15} columns, got {tile[0]}, {columns}"
        )
    return tuple(tile)


def group_count(shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks of filters and how many parts of channels a weight has."""
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def _index_dtype(tile: tuple[int, int], taps: int) -> torch.dtype:
    return torch.uint8 if tile[1] * taps <= 256 else torch.int16


def _pack(mask: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return where the kept entries of a mask are, and columns, segments and offsets."""
    taps = mask.shape[2] * mask.shape[3]
    (filters, width), rows = (mask.shape[0], mask.shape[1] * taps), tile[0]
    blocks, parts = group_count(mask.shape, tile)
    span = max(tile[1] * taps, 1)
    row, column = mask.reshape(filters, width).nonzero(as_tuple=True)
    counts = torch.bincount(row * parts + column // span, minlength=filters * parts)
    # A run: the entries of one filter in one tile. Sorted by group, falling length, row.
    runs = counts.nonzero()[:, 0]
    group = runs // max(parts, 1) // rows * parts + runs % max(parts, 1)
    order = torch.argsort(group * (span + 1) + (span - counts[runs]), stable=True)
    runs, group, first = runs[order], group[order], counts.cumsum(0) - counts
    length = counts[runs]
    shift = (first[runs] - (length.cumsum(0) - length)).repeat_interleave(length)
    entry = torch.arange(row.numel(), device=mask.device) + shift
    dtype = _index_dtype(tile, taps)
    segments = torch.stack((runs // max(parts, 1) % rows, length - 1), 1).to(dtype)
    ends = torch.zeros((blocks * parts + 1, 2), dtype=torch.int64, device=mask.device)
    ends[1:].index_add_(0, group, torch.stack((length, torch.ones_like(length)), 1))
    columns = (column[entry] % span).to(dtype)
    return (row * width + column)[entry], columns, segments, ends.cumsum(0).int()
