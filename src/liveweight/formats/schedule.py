"""In which order a GPU walks kept blocks, and the same blocks listed column after column."""

from __future__ import annotations

import torch
from torch import Tensor


def make_schedule(row_offsets: Tensor, columns: Tensor, width: int) -> Tensor:
    """Return the order of rows and columns of blocks, and the list of blocks turned.

    row_offsets  [rows + 1] int32; row r owns columns[row_offsets[r]:row_offsets[r + 1]]
    columns      [kept] int32 in [0, width)
    width        columns of blocks
    returns      [rows + width + (width + 1) + 2 kept] int32 on columns' device, in this order:

        order           [rows]       rows of blocks, those with the most blocks first
        turned_order    [width]      columns of blocks, those with the most blocks first
        turned_offsets  [width + 1]  column c owns turned_*[turned_offsets[c]:turned_offsets[c + 1]]
        turned_blocks   [kept]       numbers of the blocks, from the top of each column down
        turned_rows     [kept]       the row of blocks of each of them

    Equals keep their order. Work that is handed out longest first ends at about the same time
    everywhere; the turned list serves the gradient to the input, which sums over rows.
    """
    kept, rows = columns.numel(), row_offsets.numel() - 1
    lengths = row_offsets[1:] - row_offsets[:-1]
    counts = columns.new_zeros(width).index_add(0, columns, torch.ones_like(columns))
    turned_offsets = columns.new_zeros(width + 1)
    turned_offsets[1:] = counts.cumsum(0)
    turned_blocks = columns.argsort(stable=True)
    row_of = torch.repeat_interleave(
        torch.arange(rows, device=columns.device), lengths.long(), output_size=kept
    )
    parts = (
        lengths.argsort(stable=True, descending=True),
        counts.argsort(stable=True, descending=True),
        turned_offsets,
        turned_blocks,
        row_of[turned_blocks],
    )
    return torch.cat([part.to(torch.int32) for part in parts])


def check_schedule(
    owner: str, schedule: Tensor, row_offsets: Tensor, columns: Tensor, width: int
) -> None:
    """Raise TypeError or ValueError unless schedule is make_schedule of the others."""
    if schedule.dtype != torch.int32:
        got = str(schedule.dtype).removeprefix("torch.")
        raise TypeError(f"{owner}: schedule must be int32, got {got}")
    if schedule.device != columns.device:
        raise ValueError(f"{owner}: schedule on {schedule.device}, columns on {columns.device}")
    wanted = make_schedule(row_offsets, columns, width)
    if schedule.shape != wanted.shape:
        raise ValueError(
            f"{owner}: schedule must have shape {tuple(wanted.shape)}, got {tuple(schedule.shape)}"
        )
    if not torch.equal(schedule, wanted):
        raise ValueError(f"{owner}: schedule must be make_schedule(row_offsets, columns, {width})")
