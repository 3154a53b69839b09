"""Two weights stored of every four neighbours along a row, laid out for sparse tensor cores."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from liveweight.formats import pattern
from liveweight.formats.delta import is_filler

TILE_ROWS, TILE_COLUMNS = 16, 128  # of W: what a warp multiplies between two loads of indices
_STEP = 32  # columns of one mma.sp.m16n8k32
_HALVES = (torch.bfloat16, torch.float16)

# Index pair of a group of four by its mask (bit i: column i is kept): first | second << 2. Where
# fewer than two are kept the lowest free columns fill up; more than two are no pattern (0, as no
# pair has it).
CODES = (4, 4, 4, 4, 8, 8, 9, 0, 12, 12, 13, 0, 14, 0, 0, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class SemiStructured(pattern.PackedWeight):
    """A matrix W of shape (N, K) that keeps at most 2 of every 4 entries along K: 2:4.

    Rows are padded to a multiple of 16 and columns to one of 128; R and U count the tiles of
    16 x 128. Each lane of a warp finds its operands of mma.sp.m16n8k32 as 16 bytes in a row.

    values  [R, U, 4, 32, 8] bfloat16 or float16 (others: plain PyTorch only). Axes: tile row, tile
            column, step of 32 columns, lane, element. With lane = 4 g + t, element
            4 h + 2 r + e is entry e of row g + 8 r, columns 16 h + 4 t to 16 h + 4 t + 3 of the
            step
    meta    [R, U, 32, 2] int32: index pairs. Word w of lane 4 g + 2 s + h has, at bit
            16 r + 4 j, first | second << 2 of row g + 8 r, columns 16 h + 4 j to 16 h + 4 j + 3 of
            step 2 w + s: what mma.sp::ordered_metadata reads with selector s
    shape   (N, K) = (out_features, in_features)

    A group that keeps fewer than two entries is filled up at its lowest free columns. Fillers, and
    what stands beside W, have the value -0.0; a kept -0.0 is stored as 0.0. Fillers get no
    gradient, but infinity and NaN of x meet them.
    The constructor stores what it is given; ``validate`` checks it.
    """

    name: ClassVar[str] = "semi_structured"

    values: Tensor
    meta: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> SemiStructured:
        """Keep the entries of weight [N, K] that are not zero, or those under mask [N, K] bool.

        Packs where the weight is: on a GPU a kernel does it for bfloat16 and float16.
        Raises TypeError (dtypes), ValueError (shapes) and ValueError that names the first group
        with more than two entries.
        """
        pattern.check_dense("SemiStructured", weight, 2)
        shape = tuple(weight.shape)
        if mask is not None:
            pattern.check_mask("SemiStructured", mask, (shape,))
            mask = mask.to(weight.device).contiguous()
        compiled = weight.is_cuda and weight.dtype in _HALVES
        run = torch.ops.liveweight.semi_structured_pack if compiled else pack
        values, meta, crowded = run(weight.detach().contiguous(), mask)
        if bool(crowded):
            _raise_crowded(weight != 0 if mask is None else mask)
        return cls(values, meta, shape)

    def to_dense(self) -> Tensor:
        """Return W [N, K], a new tensor, with gradient to the values where they want one."""
        compiled = self.values.is_cuda and self.values.dtype in _HALVES
        if compiled and not (torch.is_grad_enabled() and self.values.requires_grad):
            return torch.ops.liveweight.semi_structured_to_dense(
                self.values, self.meta, list(self.shape)
            )
        return unpack(self.values, self.meta, self.shape)

    def mask(self) -> Tensor:
        """Return which entries are stored: bool [N, K]; fillers are none."""
        values = self.values.detach()
        marked = torch.where(is_filler(values), values, torch.ones_like(values))
        return unpack(marked, self.meta, self.shape) != 0

    def validate(self) -> SemiStructured:
        """Return self if all invariants of the class hold; raise TypeError or ValueError if not."""
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise ValueError(f"SemiStructured: shape must be (N, K), got {tuple(self.shape)}")
        R, U = tiles_of(self.shape)
        if self.meta.dtype != torch.int32:
            got = str(self.meta.dtype).removeprefix("torch.")
            raise TypeError(f"SemiStructured: meta must be int32, got {got}")
        if tuple(self.meta.shape) != (R, U, 32, 2):
            raise ValueError(
                f"SemiStructured: meta must have shape {(R, U, 32, 2)}, got "
                f"{tuple(self.meta.shape)}"
            )
        pattern.check_values("SemiStructured", self.values, (R, U, 4, 32, 8), self.meta)
        codes = read_codes(self.meta)
        known = torch.zeros(16, dtype=torch.bool, device=codes.device)
        known[list(set(CODES) - {0})] = True
        if not bool((right := known[codes.long()]).all()):
            row, group = (~right).nonzero()[0].tolist()
            raise ValueError(
                f"SemiStructured: meta must hold two rising columns for each group, got code "
                f"{int(codes[row, group])} in row {row}, columns {4 * group} to {4 * group + 3}"
            )
        dense = unpack(self.values.detach(), self.meta, (R * TILE_ROWS, U * TILE_COLUMNS))
        N, K = self.shape
        if bool((dense[N:] != 0).any()) or bool((dense[:, K:] != 0).any()):
            raise ValueError(f"SemiStructured: values beyond shape {tuple(self.shape)} must be 0")
        return self

    @property
    def density(self) -> float:
        """Fraction of entries kept, in [0, 1/2]; 0 where there are none."""
        N, K = self.shape
        return int((~is_filler(self.values)).sum()) / (N * K) if N and K else 0.0

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.meta


def tiles_of(shape: tuple[int, int]) -> tuple[int, int]:
    """Return (R, U): how many tiles stand below and beside each other."""
    return -(-shape[0] // TILE_ROWS), -(-shape[1] // TILE_COLUMNS)


def pack(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (values, meta, crowded) of a weight [N, K], kept where mask is, or where not zero.

    crowded [1] int32 is not zero where a group keeps more than two entries; values and meta then
    mean nothing.
    """
    R, U = tiles_of(tuple(weight.shape))
    padded = weight.new_zeros(R * TILE_ROWS, U * TILE_COLUMNS)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    groups = padded.view(R * TILE_ROWS, U * TILE_COLUMNS // 4, 4)
    kept = groups != 0
    if mask is not None:
        kept = torch.zeros_like(padded, dtype=torch.bool)
        kept[: mask.shape[0], : mask.shape[1]] = mask
        kept = kept.view(groups.shape)
    bits = kept.to(torch.uint8)
    masks = bits[..., 0] + 2 * bits[..., 1] + 4 * bits[..., 2] + 8 * bits[..., 3]
    codes = torch.tensor(CODES, dtype=torch.uint8, device=weight.device)[masks.long()]
    crowded = (codes == 0).any().to(torch.int32).view(1)
    places = columns_of(codes)
    pairs = groups.gather(2, places)
    pairs = pairs.masked_fill(pairs == 0, 0).masked_fill(~kept.gather(2, places), -0.0)
    return write_values(pairs), write_codes(codes), crowded


def unpack(values: Tensor, meta: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return W [N, K], a new tensor: the inverse of pack."""
    pairs, codes = read_values(values), read_codes(meta)
    pairs = pairs.masked_fill(is_filler(pairs), 0)
    dense = values.new_zeros(*codes.shape, 4).scatter(2, columns_of(codes), pairs)
    return dense.flatten(1)[: shape[0], : shape[1]].contiguous()


def take(dense: Tensor, meta: Tensor) -> Tensor:
    """Return the entries of dense [N, K] at the places of meta, laid out like values."""
    R, U = meta.shape[:2]
    padded = dense.new_zeros(R * TILE_ROWS, U * TILE_COLUMNS)
    padded[: dense.shape[0], : dense.shape[1]] = dense
    codes = read_codes(meta)
    return write_values(padded.view(*codes.shape, 4).gather(2, columns_of(codes)))


def columns_of(codes: Tensor) -> Tensor:
    """Return the two columns inside its group that each code [..., G] names: int64 [..., G, 2]."""
    return torch.stack([codes & 3, codes >> 2 & 3], -1).long()


def write_values(pairs: Tensor) -> Tensor:
    """Lay entries [16 R, 32 U, 2], in the order of rows and columns, out as values."""
    R, U = pairs.shape[0] // TILE_ROWS, pairs.shape[1] * 4 // TILE_COLUMNS
    axes = pairs.reshape(R, 2, 8, U, 4, 2, 4, 2)  # R r g U step h t e
    return axes.permute(0, 3, 4, 2, 6, 5, 1, 7).reshape(R, U, 4, 32, 8)


def read_values(values: Tensor) -> Tensor:
    """Return entries [16 R, 32 U, 2] in the order of rows and columns: undoes write_values."""
    R, U = values.shape[:2]
    axes = values.reshape(R, U, 4, 8, 4, 2, 2, 2)  # R U step g t h r e
    return axes.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(R * TILE_ROWS, U * 32, 2)


def _shifts(device: torch.device) -> Tensor:
    """Return the bit of each index pair in a word of meta: int32 [2, 4] by (r, j)."""
    r, j = torch.arange(2, device=device), torch.arange(4, device=device)
    return (16 * r[:, None] + 4 * j).int()


def write_codes(codes: Tensor) -> Tensor:
    """Lay codes [16 R, 32 U] uint8, in the order of rows and columns, out as meta."""
    R, U = codes.shape[0] // TILE_ROWS, codes.shape[1] * 4 // TILE_COLUMNS
    axes = codes.view(R, 2, 8, U, 2, 2, 2, 4).permute(0, 3, 2, 5, 6, 4, 1, 7)  # R U g s h w r j
    return (axes.int() << _shifts(codes.device)).sum((-2, -1), dtype=torch.int32).view(R, U, 32, 2)


def read_codes(meta: Tensor) -> Tensor:
    """Return codes [16 R, 32 U] uint8 in the order of rows and columns: undoes write_codes."""
    R, U = meta.shape[:2]
    axes = meta.reshape(R, U, 8, 2, 2, 2)[..., None, None] >> _shifts(meta.device) & 15
    order = axes.to(torch.uint8).permute(0, 6, 2, 1, 5, 3, 4, 7)  # R r g U w s h j
    return order.reshape(R * TILE_ROWS, U * 32)


def _raise_crowded(kept: Tensor) -> None:
    """Raise ValueError that names the first group with more than two entries."""
    width = kept.shape[1]
    padded = torch.nn.functional.pad(kept, (0, -width % 4))
    counts = padded.view(kept.shape[0], -1, 4).sum(-1)
    row, group = (counts > 2).nonzero()[0].tolist()
    raise ValueError(
        f"SemiStructured: expected at most 2 of 4 entries kept, got {int(counts[row, group])} in "
        f"row {row}, columns {4 * group} to {min(4 * group + 4, width) - 1}"
    )
