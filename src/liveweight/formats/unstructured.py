"""Single weights of a Linear layer removed anywhere: entries in tiles with one-byte columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from liveweight._packing import tile_pattern
from liveweight.formats import pattern

MAX_ROWS = 256  # of a tile
MAX_COLUMNS = 32768
MOST_BITS = 6  # stored where they take at most so many for each kept weight


@dataclasses.dataclass(frozen=True, eq=False)
class Unstructured(pattern.PackedWeight):
    """A sparse matrix W of shape (N, K), cut into tiles of R rows x T columns.

    Tiles follow each other along a block of R rows, then block after block. In a tile every row
    that keeps something is a segment; segments stand by falling number of entries, so that loops
    over them repeat their length, and by rising row where numbers are equal.

    values    [nnz] floating point: tile after tile, segment after segment, columns rising
    columns   [nnz] uint8 (T <= 256) or int16: column of the entry inside its tile
    segments  [S, 2] like columns: row inside its tile, number of entries - 1
    offsets   [tiles + 1, 2] int32: first entry and first segment of each tile
    bits      [S, T / 8] uint8: bit c % 8 of byte c // 8 is set where column c of the tile is kept.
              Repeats columns for kernels that read bits faster; [0, 0] where few weights are kept
    shape     (N, K) = (out_features, in_features)
    tile      (R, T), R <= 256, T <= 32768

    With one-byte columns a kept weight takes 5 bytes in fp32, and a segment 2; where bits are
    stored, from a density of about 1/6 on, they take at most 0.75 bytes for each weight.
    The constructor stores what it is given; ``validate`` checks it.
    """

    name: ClassVar[str] = "unstructured"

    values: Tensor
    columns: Tensor
    segments: Tensor
    offsets: Tensor
    bits: Tensor
    shape: tuple[int, int]
    tile: tuple[int, int]

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None = None, *, tile: tuple[int, int] | None = None
    ) -> Unstructured:
        """Keep the entries of weight [N, K] that are not zero (-0.0 is zero), or those under mask.

        mask [N, K] bool says what is kept, zeros included; values never change. tile is (R, T);
        by default what suits the kernels for this shape and density.
        Raises TypeError (dtypes) and ValueError (shapes, sizes).
        """
        pattern.check_dense("Unstructured", weight, 2)
        if mask is None:
            mask = weight != 0
        pattern.check_mask("Unstructured", mask, (tuple(weight.shape),))
        shape = tuple(weight.shape)
        tile = check_tile(tile) if tile is not None else pick_tile(shape)
        order, columns, segments, offsets = tile_pattern(mask, tile)
        values = weight.detach().reshape(-1)[order]
        bits = segment_bits(mask, segments, offsets, tile)
        return cls(values, columns, segments, offsets, bits, shape, tile)

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Return (rows, columns) of the entries in the order of values: int64 [nnz] each."""
        parts = (self.columns, self.segments, self.offsets)
        return tile_places(*parts, self.tile, self.shape[1])

    def to_dense(self) -> Tensor:
        """Return W [N, K], a new tensor."""
        return self.values.new_zeros(self.shape).index_put(self.coordinates(), self.values)

    def validate(self) -> Unstructured:
        """Return self if every invariant of the class holds; raise TypeError or ValueError if not.

        Ops check only what guards memory.
        """
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise ValueError(f"Unstructured: shape must be (N, K), got {tuple(self.shape)}")
        check_tile(self.tile)
        self._check_index()
        pattern.check_values("Unstructured", self.values, (self.columns.numel(),), self.columns)
        entries, segments = self.offsets[:, 0].long(), self.offsets[:, 1].long()
        counts = self.segments[:, 1].long() + 1
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        if not torch.equal(ends[segments], entries):
            raise ValueError("Unstructured: segments and offsets count different entries")
        self._check_places(counts)
        self._check_bits(counts)
        return self

    def _check_index(self) -> None:
        """Raise unless columns, segments and offsets have their dtypes, shapes and ranges."""
        kind = torch.uint8 if self.tile[1] <= 256 else torch.int16
        for name, index, dtype in (
            ("columns", self.columns, kind),
            ("segments", self.segments, kind),
            ("offsets", self.offsets, torch.int32),
        ):
            if index.dtype != dtype:
                raise TypeError(f"Unstructured: {name} must be {_word(dtype)}, got {_word(index)}")
            if index.device != self.columns.device:
                raise ValueError(
                    f"Unstructured: {name} on {index.device}, columns on {self.columns.device}"
                )
        rows, along = tiles_of(self.shape, self.tile)
        sizes = {"columns": (None,), "segments": (None, 2), "offsets": (rows * along + 1, 2)}
        for name, size in sizes.items():
            got = tuple(getattr(self, name).shape)
            if len(got) != len(size) or any(
                w not in (None, g) for w, g in zip(size, got, strict=True)
            ):
                raise ValueError(f"Unstructured: {name} must be {list(size)}, got {list(got)}")
        ends = (self.columns.numel(), self.segments.shape[0])
        if tuple(self.offsets[0].tolist()) != (0, 0) or tuple(self.offsets[-1].tolist()) != ends:
            raise ValueError(f"Unstructured: offsets must rise from (0, 0) to {ends}")
        if bool((self.offsets[1:] < self.offsets[:-1]).any()):
            raise ValueError("Unstructured: offsets must not decrease")

    def _check_places(self, counts: Tensor) -> None:
        """Raise unless entries lie inside W, columns rise, and rows stand once in a tile."""
        if bool((counts < 1).any()) or bool((self.segments[:, 0] < 0).any()):
            raise ValueError("Unstructured: segments must hold numbers >= 0")
        if bool((self.columns < 0).any()):
            raise ValueError("Unstructured: columns must be >= 0")
        if self.columns.numel() == 0:
            return
        if int(self.segments[:, 0].max()) >= self.tile[0]:
            raise ValueError(f"Unstructured: segments name rows beyond tile {self.tile}")
        rows, columns = self.coordinates()
        for axis, places in enumerate((rows, columns)):
            if int(places.max()) >= self.shape[axis]:
                raise ValueError(
                    f"Unstructured: {('segments', 'columns')[axis]} reach {int(places.max())}, "
                    f"beyond shape {tuple(self.shape)}"
                )
        segment = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        if bool(((segment[1:] == segment[:-1]) & (columns[1:] <= columns[:-1])).any()):
            raise ValueError("Unstructured: columns must rise inside a segment")
        tiles = pattern.expand_rows(self.offsets[:, 1], len(counts))
        names = tiles * MAX_ROWS + self.segments[:, 0].long()
        if names.unique().numel() != names.numel():
            raise ValueError("Unstructured: a row stands twice in a tile")

    def _check_bits(self, counts: Tensor) -> None:
        """Raise unless bits are absent or name the columns of every segment."""
        if self.bits.dtype != torch.uint8:
            raise TypeError(f"Unstructured: bits must be uint8, got {_word(self.bits)}")
        if self.bits.device != self.columns.device:
            raise ValueError(
                f"Unstructured: bits on {self.bits.device}, columns on {self.columns.device}"
            )
        if self.bits.numel() == 0:
            return
        size = (len(counts), self.tile[1] // 8)
        if not takes_bits(self.tile) or tuple(self.bits.shape) != size:
            raise ValueError(
                f"Unstructured: bits must be {list(size)} for a tile of 16, 32, ... 256 columns or "
                f"empty, got {list(self.bits.shape)} for tile {self.tile}"
            )
        places = self.bits.unsqueeze(-1) & _powers(self.bits)
        segment, column = places.flatten(1).nonzero(as_tuple=True)
        same = torch.equal(torch.bincount(segment, minlength=len(counts)), counts)
        if not (same and torch.equal(column, self.columns.long())):
            raise ValueError("Unstructured: bits and columns name different entries")

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.segments, self.offsets, self.bits, self.columns


def takes_bits(tile: tuple[int, int]) -> bool:
    """Return whether columns of a tile can be told by bits: 16, 32, ... 256 of them."""
    return tile[1] <= 256 and tile[1] % 16 == 0


def segment_bits(mask: Tensor, segments: Tensor, offsets: Tensor, tile: tuple[int, int]) -> Tensor:
    """Return which columns each segment of a mask [N, K] keeps, as bits [S, T / 8] uint8.

    Bit c % 8 of byte c // 8 is column c. Empty [0, 0] where there would be more than MOST_BITS
    for each kept weight or the tile does not allow them.
    """
    rows, along = tiles_of(tuple(mask.shape), tile)
    few = segments.shape[0] * tile[1] > MOST_BITS * int(mask.count_nonzero())
    if few or not takes_bits(tile):
        return torch.zeros(0, 0, dtype=torch.uint8, device=mask.device)
    padded = mask.new_zeros(rows * tile[0], along * tile[1], dtype=torch.uint8)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    words = padded.view(rows * tile[0], along, tile[1] // 8, 8)
    packed = (words * _powers(words)).sum(-1, dtype=torch.uint8)
    tiles = pattern.expand_rows(offsets[:, 1], segments.shape[0])
    row = tiles.div(along, rounding_mode="floor") * tile[0] + segments[:, 0].long()
    return packed[row, tiles % along]


def _powers(like: Tensor) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=like.device)


def tile_places(
    columns: Tensor, segments: Tensor, offsets: Tensor, tile: Sequence[int], in_features: int
) -> tuple[Tensor, Tensor]:
    """Return (row, column) of each entry of a tiled pattern: int64 [nnz] each."""
    along, kept = max(-(-in_features // tile[1]), 1), columns.numel()
    tiles = pattern.expand_rows(offsets[:, 1], segments.shape[0])  # of each segment
    counts = segments[:, 1].long() + 1
    row = tiles.div(along, rounding_mode="floor") * tile[0] + segments[:, 0].long()
    start = tiles % along * tile[1]
    rows, starts = (torch.repeat_interleave(v, counts, output_size=kept) for v in (row, start))
    return rows, starts + columns.long()


def tiles_of(shape: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """Return how many tiles stand below and beside each other."""
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def check_tile(tile: tuple[int, int]) -> tuple[int, int]:
    """Return tile as a pair; raise ValueError unless it is (1..256 rows, 1..32768 columns)."""
    pair = tuple(tile)
    if len(pair) != 2 or not all(isinstance(size, int) for size in pair):
        raise ValueError(f"Unstructured: tile must be (rows, columns), got {tile!r}")
    if not (1 <= pair[0] <= MAX_ROWS and 1 <= pair[1] <= MAX_COLUMNS):
        raise ValueError(
            f"Unstructured: tile must be within ({MAX_ROWS}, {MAX_COLUMNS}), got {pair}"
        )
    return pair


def pick_tile(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the default tile: blocks of rows that threads can share, one byte per column.

    Tiles beside each other are equally wide, but for rounding to 16: a last one of few columns
    would cost as much as a full one.
    """
    eighth, along = -(-shape[0] // 8), max(-(-shape[1] // 256), 1)
    return _up_to_16(eighth, MAX_ROWS), _up_to_16(-(-shape[1] // along), 256)


def _up_to_16(size: int, most: int) -> int:
    return min(max(-(-size // 16) * 16, 16), most)


def _word(value: Tensor | torch.dtype) -> str:
    dtype = value.dtype if isinstance(value, Tensor) else value
    return str(dtype).removeprefix("torch.")
