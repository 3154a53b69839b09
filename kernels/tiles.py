"""Tile sizes of the Triton kernels: one table, one pure function, no autotuner.

The rows were chosen from the compiler's resource reports (registers, spills, shared memory,
instructions per matrix instruction; benchmarks/results/gpu-machine-code.md), not yet from timings.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Tile:
    """A block of output m x n, walked in steps of k; how many warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class _Row:
    op: str
    arch: int  # this compute capability (10 * major + minor) and newer ones
    item_bytes: int
    most_m: int | None  # output rows up to which the row holds; None: any number
    tile: Tile


# The kernel's loads are indirect (the list of blocks, then the operands), so Triton spends half of
# the stages on the list: 5 stages are 3 buffers of operands.
# Unpacking the mask costs about 9 instructions per weight and tile; a tall tile spreads it over
# more output rows. sm_90 needs m >= 64 for its own matrix instruction.
_TABLE = (
    _Row("masked_linear", 90, 2, 32, Tile(16, 32, 128, warps=4, stages=5)),
    _Row("masked_linear", 90, 2, 128, Tile(64, 64, 64, warps=4, stages=5)),
    _Row("masked_linear", 90, 2, None, Tile(256, 64, 64, warps=8, stages=5)),
    _Row("masked_linear", 90, 4, 32, Tile(16, 32, 64, warps=4, stages=5)),
    _Row("masked_linear", 90, 4, None, Tile(128, 64, 32, warps=8, stages=5)),
    _Row("masked_linear", 80, 2, 32, Tile(16, 32, 128, warps=4, stages=5)),
    _Row("masked_linear", 80, 2, 128, Tile(64, 64, 64, warps=4, stages=5)),
    _Row("masked_linear", 80, 2, None, Tile(128, 128, 32, warps=8, stages=5)),
    _Row("masked_linear", 80, 4, 32, Tile(16, 32, 64, warps=4, stages=5)),
    _Row("masked_linear", 80, 4, None, Tile(128, 64, 32, warps=8, stages=5)),
)


def pick_tile(
    op: str, shape: tuple[int, int, int], density: float, dtype: torch.dtype, arch: int
) -> Tile:
    """Return the tile for one call.

    op       name of the kernel
    shape    (M, N, K) of the product
    density  of the mask, 1 where unknown; no row of masked_linear depends on it
    dtype    of the operands
    arch     compute capability, 80 for 8.0

    Raises ValueError where the table has no row.
    """
    for row in _TABLE:
        fits = row.most_m is None or shape[0] <= row.most_m
        if row.op == op and row.arch <= arch and row.item_bytes == dtype.itemsize and fits:
            return row.tile
    raise ValueError(f"pick_tile: no tile for {op} with {dtype} on compute capability {arch}")


def listed_tiles(op: str, arch: int, item_bytes: int) -> list[Tile]:
    """Return every tile that pick_tile can give for one op, capability and element size."""
    best = max((row.arch for row in _TABLE if row.op == op and row.arch <= arch), default=0)
    return [
        row.tile for row in _TABLE if (row.op, row.arch, row.item_bytes) == (op, best, item_bytes)
    ]
