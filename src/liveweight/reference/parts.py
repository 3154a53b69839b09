"""What the references share: rows of a pattern, and parts that bound the memory of a gather."""

from __future__ import annotations

import torch
from torch import Tensor

# A gather of at most this many numbers at once: 64 MB of float32.
_CHUNK = 1 << 24


def row_of(row_offsets: Tensor, kept: int) -> Tensor:
    """Return the row of each kept entry: int64 [kept]."""
    rows = torch.arange(row_offsets.numel() - 1, device=row_offsets.device)
    counts = (row_offsets[1:] - row_offsets[:-1]).long()
    return torch.repeat_interleave(rows, counts, output_size=kept)


def batches(total: int, cost: int) -> list[tuple[int, int]]:
    """Return (start, length) of parts of total items; an item costs `cost` numbers."""
    step = max(1, _CHUNK // max(cost, 1))
    return [(start, min(step, total - start)) for start in range(0, total, step)]
