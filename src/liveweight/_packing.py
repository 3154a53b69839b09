"""Masks as CSR patterns and as bits, through the compiled packers where they are built."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from liveweight import _library
from liveweight._check import check_tensor

_MASKS = (torch.bool, torch.uint8)
_LIMIT = 2**31 - 1  # int32 indices


def _as_array(mask: Tensor) -> np.ndarray:
    return mask.detach().cpu().contiguous().numpy()


def _csr_pattern(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts = np.count_nonzero(mask, axis=1)
    if counts.sum() > _LIMIT or mask.shape[1] > _LIMIT:
        raise ValueError(
            f"csr_pattern: int32 indices hold at most {_LIMIT} entries, columns; got "
            f"{counts.sum()} entries, {mask.shape[1]} columns"
        )
    row_offsets = np.zeros(mask.shape[0] + 1, dtype=np.int32)
    np.cumsum(counts, out=row_offsets[1:])
    return row_offsets, np.nonzero(mask)[1].astype(np.int32)


def csr_pattern(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a mask is set, row by row: (row_offsets, columns).

    mask         [N, K]  bool or uint8
    row_offsets  [N + 1] int32; row n owns columns[row_offsets[n]:row_offsets[n + 1]]
    columns      [nnz]   int32, ascending inside a row; both on the mask's device

    Raises TypeError for another dtype, ValueError for another rank or more than 2**31 - 1 entries.
    """
    check_tensor("csr_pattern", "mask", mask, dim=2, dtypes=_MASKS)
    find = _library.pack.csr_pattern if _library.pack is not None else _csr_pattern
    row_offsets, columns = find(_as_array(mask))
    return torch.from_numpy(row_offsets).to(mask.device), torch.from_numpy(columns).to(mask.device)


def _tile_pattern(mask: np.ndarray, tile: tuple[int, int]) -> tuple[np.ndarray, ...]:
    (rows, columns), (R, T) = np.nonzero(mask), tile
    if rows.size > _LIMIT:
        raise ValueError(f"tile_pattern: at most {_LIMIT} entries, got {rows.size}")
    kind = np.uint8 if T <= 256 else np.int16
    along = -(-mask.shape[1] // T)
    place = rows // R * along + columns // T  # tile of each entry
    tiles = -(-mask.shape[0] // R) * along
    names, segment, counts = np.unique(
        place * R + rows % R, return_inverse=True, return_counts=True
    )
    ranked = np.lexsort((names % R, -counts, names // R))  # segments in their final order
    rank = np.empty_like(ranked)
    rank[ranked] = np.arange(ranked.size)
    order = np.lexsort((columns, rank[segment]))
    segments = np.stack([names[ranked] % R, counts[ranked] - 1], axis=1).astype(kind)
    offsets = np.zeros((tiles + 1, 2), dtype=np.int32)
    offsets[1:, 0] = np.cumsum(np.bincount(place, minlength=tiles))
    offsets[1:, 1] = np.cumsum(np.bincount(names // R, minlength=tiles))
    flat = rows[order] * mask.shape[1] + columns[order]
    return flat, (columns[order] % T).astype(kind), segments, offsets


def tile_pattern(mask: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return where a mask is set, tile after tile: (order, columns, segments, offsets).

    mask      [N, K] bool or uint8
    tile      (R, T) rows and columns of a tile
    order     [nnz] int64: places in the flattened mask
    columns   [nnz] uint8 (T <= 256) or int16: columns inside the tile, rising in a segment
    segments  [S, 2] like columns: row inside the tile, number of entries - 1; most entries first
    offsets   [tiles + 1, 2] int32: first entry and first segment of each tile

    Raises TypeError for another dtype, ValueError for another rank or more than 2**31 - 1 entries.
    """
    check_tensor("tile_pattern", "mask", mask, dim=2, dtypes=_MASKS)
    find = _library.pack.tile_pattern if _library.pack is not None else _tile_pattern
    parts = find(_as_array(mask), tuple(tile))
    return tuple(torch.from_numpy(part).to(mask.device) for part in parts)


def pack_bits(mask: Tensor) -> Tensor:
    """Return the flattened mask as bits: bit i % 8 of byte i // 8 is set where mask[i] is.

    mask     any shape, bool or uint8
    returns  [ceil(mask.numel() / 8)]  uint8, on the CPU; unused bits are 0

    Raises TypeError for another dtype.
    """
    check_tensor("pack_bits", "mask", mask, dtypes=_MASKS)
    flat = _as_array(mask).reshape(-1)
    if _library.pack is not None:
        return torch.from_numpy(_library.pack.pack_bits(flat))
    return torch.from_numpy(np.packbits(flat != 0, bitorder="little"))


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """Return the first count bits as a mask: the inverse of pack_bits.

    bits     [ceil(count / 8)]  uint8
    returns  [count]            bool, on the CPU

    Raises TypeError for another dtype, ValueError for a count that does not fit the bytes.
    """
    check_tensor("unpack_bits", "bits", bits, dim=1, dtypes=(torch.uint8,))
    if count < 0 or bits.numel() != -(-count // 8):
        raise ValueError(
            f"unpack_bits: {count} bits need {-(-max(count, 0) // 8)} bytes, got {bits.numel()}"
        )
    packed = _as_array(bits)
    if _library.pack is not None:
        return torch.from_numpy(_library.pack.unpack_bits(packed, count)).view(torch.bool)
    return torch.from_numpy(np.unpackbits(packed, count=count, bitorder="little")).view(torch.bool)
