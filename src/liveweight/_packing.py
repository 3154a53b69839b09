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
