"""Single weights of a Linear layer removed anywhere, told by one bit for each weight."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from liveweight.formats import pattern

_OWNER = "Bitmap"
TILE = (32, 128)  # rows and columns of a tile
WORDS = 128  # of bits in a tile
PART = 8  # values: tiles begin at multiples of 16 bytes, where values have two
_SPLIT = (2, 2, 8, 4, 4, 2, 4)  # rows: m, half, g; columns: pair, t, step, i
# Axes of a grid of tiles (tile row, m, half, g, tile column, pair, t, step, i) in storage order.
_STORED = (0, 4, 5, 7, 1, 2, 3, 6, 8)


@dataclasses.dataclass(frozen=True, eq=False)
class Bitmap(pattern.PackedWeight):
    """A sparse matrix W of shape (N, K) in tiles of 32 rows x 128 columns, a bit for each weight.

    For GPUs, where few samples meet many weights: a weight takes one bit, and two bytes more where
    it is kept. Tiles follow each other along 32 rows, then block of rows after block; N and K are
    filled up with pruned weights. Inside a tile weights stand in the order in which a warp turns
    them into the fragments of a matrix instruction:

        row = 16 m + 8 half + g,  column = 32 pair + 8 t + 4 step + i

    are sorted by (pair, step, m, half, g, t, i); lane 4 g + t of a warp owns the four weights i.

    values   [stored] floating point: the kept weights in that order, each tile filled up with zeros
             to a multiple of 8
    bits     [tiles, 128] int32: word 4 h + q, h counting (pair, step, m, half), tells what lanes
             8 q to 8 q + 7 keep: bit 8 i + l is set where lane 8 q + l keeps its weight i
    offsets  [tiles + 1] int32: where the values of a tile begin, in units of 8
    shape    (N, K) = (out_features, in_features)
    most     the largest number of units of 8 values in one tile

    The constructor stores what it is given; ``validate`` checks it.
    """

    name: ClassVar[str] = "bitmap"

    values: Tensor
    bits: Tensor
    offsets: Tensor
    shape: tuple[int, int]
    most: int

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> Bitmap:
        """Keep the entries of weight [N, K] that are not zero (-0.0 is zero), or those under mask.

        mask [N, K] bool says what is kept, zeros included; values never change. Runs on the
        weight's device. Raises TypeError (dtypes) and ValueError (shapes).
        """
        pattern.check_dense(_OWNER, weight, 2)
        weight, shape = weight.detach(), tuple(weight.shape)
        if mask is None:
            mask = weight != 0
        pattern.check_mask(_OWNER, mask, (shape,))
        kept = to_stored(mask)
        counts = kept.sum(1, dtype=torch.int64)
        parts = (counts + PART - 1) // PART
        ends = parts.cumsum(0)
        starts = ends - parts
        # One look at the device: how much to allocate.
        stored, most = torch.stack([ends[-1], parts.max()]).tolist() if len(parts) else (0, 0)
        if stored >= 2**31:
            raise ValueError(f"{_OWNER}: at most 2**34 values are stored, got {stored * PART}")
        offsets = torch.cat([starts, ends[-1:]]) if len(parts) else ends.new_zeros(1)
        values = weight.new_zeros(stored * PART)
        places = PART * starts[:, None] + kept.cumsum(1) - 1
        values[places[kept]] = to_stored(weight)[kept]
        return cls(values, pack_words(kept), offsets.int(), shape, most)

    def mask(self) -> Tensor:
        """Return what is kept: bool [N, K]."""
        return from_stored(unpack_words(self.bits), self.shape)

    def to_dense(self) -> Tensor:
        """Return W [N, K], a new tensor."""
        return bitmap_to_dense(self.values, self.bits, self.offsets, self.shape)

    @property
    def density(self) -> float:
        """Fraction of entries kept, in [0, 1]; 0 where there are none."""
        total = self.shape[0] * self.shape[1]
        return int(unpack_words(self.bits).sum()) / total if total else 0.0

    def validate(self) -> Bitmap:
        """Return self if every invariant of the class holds; raise TypeError or ValueError if not.

        Ops check only what guards memory.
        """
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise ValueError(f"{_OWNER}: shape must be (N, K), got {tuple(self.shape)}")
        tiles = tile_count(self.shape)
        for name, index, size in (
            ("bits", self.bits, (tiles, WORDS)),
            ("offsets", self.offsets, (tiles + 1,)),
        ):
            if index.dtype != torch.int32:
                got = str(index.dtype).removeprefix("torch.")
                raise TypeError(f"{_OWNER}: {name} must be int32, got {got}")
            if tuple(index.shape) != size:
                raise ValueError(f"{_OWNER}: {name} must be {size}, got {tuple(index.shape)}")
        if self.bits.device != self.offsets.device:
            raise ValueError(f"{_OWNER}: bits on {self.bits.device}, offsets elsewhere")
        kept = unpack_words(self.bits)
        if int(kept.sum()) != int(from_stored(kept, self.shape).sum()):
            raise ValueError(f"{_OWNER}: bits are set outside of the shape {tuple(self.shape)}")
        parts = (kept.sum(1) + PART - 1) // PART
        if int(self.offsets[0]) != 0 or not torch.equal(self.offsets.long().diff(), parts):
            raise ValueError(f"{_OWNER}: offsets and bits count different values")
        most = int(parts.max()) if tiles else 0
        if self.most != most:
            raise ValueError(f"{_OWNER}: most must be {most}, got {self.most}")
        pattern.check_values(_OWNER, self.values, (PART * int(self.offsets[-1]),), self.bits)
        if int(self.values.count_nonzero()) != int(self.to_dense().count_nonzero()):
            raise ValueError(f"{_OWNER}: values must be zero behind the last of a tile")
        return self

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.bits, self.offsets


def tile_count(shape: tuple[int, int]) -> int:
    """Return how many tiles cover a matrix of this shape."""
    return -(-shape[0] // TILE[0]) * -(-shape[1] // TILE[1])


def to_stored(weight: Tensor) -> Tensor:
    """Return weight [N, K], filled up with zeros, in the order of storage: [tiles, 4096]."""
    pad = (0, -weight.shape[1] % TILE[1], 0, -weight.shape[0] % TILE[0])
    padded = functional.pad(weight, pad)
    rows, along = padded.shape[0] // TILE[0], padded.shape[1] // TILE[1]
    grid = padded.reshape(rows, *_SPLIT[:3], along, *_SPLIT[3:])
    return grid.permute(_STORED).reshape(rows * along, TILE[0] * TILE[1])


def from_stored(stored: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the matrix [N, K] whose entries stand in the order of storage [tiles, 4096]."""
    rows, along = -(-shape[0] // TILE[0]), -(-shape[1] // TILE[1])
    sizes = (rows, *_SPLIT[:3], along, *_SPLIT[3:])
    grid = stored.reshape([sizes[axis] for axis in _STORED])
    back = sorted(range(len(_STORED)), key=_STORED.__getitem__)
    return grid.permute(back).reshape(rows * TILE[0], along * TILE[1])[: shape[0], : shape[1]]


def pack_words(kept: Tensor) -> Tensor:
    """Return the bits [tiles, 128] int32 of kept [tiles, 4096] bool in the order of storage."""
    grid = kept.reshape(-1, WORDS, 8, 4).to(torch.int32)  # lane of the word, weight of the lane
    # Bits are disjoint, so their sum is their union; bit 31 wraps to the sign.
    return (grid << _places(kept.device)).sum((2, 3), dtype=torch.int32)


def unpack_words(bits: Tensor) -> Tensor:
    """Return what bits [tiles, 128] int32 tell, in the order of storage: bool [tiles, 4096]."""
    grid = bits[:, :, None, None] >> _places(bits.device) & 1
    return grid.reshape(bits.shape[0], TILE[0] * TILE[1]).bool()


def _places(device: torch.device) -> Tensor:
    lanes = torch.arange(8, dtype=torch.int32, device=device)
    return lanes[:, None] + 8 * torch.arange(4, dtype=torch.int32, device=device)


def bitmap_to_dense(
    values: Tensor, bits: Tensor, offsets: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Return W [N, K] for the parts of a Bitmap, differentiable in values."""
    if values.numel() == 0:
        return values.new_zeros(tuple(shape))
    kept = unpack_words(bits)
    places = PART * offsets[:-1, None].long() + kept.cumsum(1) - 1
    stored = torch.where(kept, values[places.clamp(min=0)], 0)
    return from_stored(stored, shape)


def bitmap_gather(dense: Tensor, bits: Tensor, offsets: Tensor, stored: int) -> Tensor:
    """Return a matrix [N, K] at the kept places, laid out as values [stored], zeros between."""
    kept = unpack_words(bits)
    places = PART * offsets[:-1, None].long() + kept.cumsum(1) - 1
    return dense.new_zeros(stored).index_put((places[kept],), to_stored(dense)[kept])
