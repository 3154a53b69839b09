"""Tile sizes of the Triton kernels: one table, one pure function, no autotuner.

A row of tile_table.py names the product that it was chosen for; a call takes the row nearest to it,
so a table of few rows serves every size. Rows belong to architectures: a newer one than any listed
takes the newest that asks no more shared memory than it has.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from .tile_table import TABLE

_SMALLEST_DENSITY = 2.0**-10  # a weight with nothing kept has a finite place beside the others
# Shared memory of one block of threads in bytes, by compute capability (10 * major + minor).
_SHARED = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10}
_SHARED |= {100: 227 << 10, 103: 227 << 10, 110: 227 << 10, 120: 99 << 10, 121: 99 << 10}


@dataclasses.dataclass(frozen=True)
class Tile:
    """A block of output m x n, walked in steps of k.

    warps   warps of one program
    stages  depth of the software pipeline
    split   into how many parts the walk is cut, each a program of its own, added up afterwards
    tma     operands come through tensor descriptors (sm_90 and newer), else by asynchronous copies
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int = 1
    tma: bool = False


def shared_limit(arch: int) -> int:
    """Return the bytes of shared memory that one block may use on a compute capability."""
    return _SHARED.get(arch, min(_SHARED.values()))


def section_of(op: str, arch: int) -> int:
    """Return the architecture of the table whose rows serve op on arch.

    It is the newest one that is not newer than arch and has no more shared memory.
    Raises ValueError where there is none.
    """
    limit = shared_limit(arch)
    fits = [a for a in TABLE.get(op, {}) if a <= arch and shared_limit(a) <= limit]
    if not fits:
        raise ValueError(f"pick_tile: no tile for {op} on compute capability {arch}")
    return max(fits)


def _rows(op: str, arch: int) -> list[tuple]:
    section = section_of(op, arch)
    return TABLE[op][section]


def _place(shape: tuple[int, ...], density: float) -> list[float]:
    sizes = [math.log2(max(size, 1)) for size in shape]
    return [*sizes, math.log2(max(density, _SMALLEST_DENSITY))]


@functools.lru_cache(maxsize=4096)
def pick_tile(
    op: str, shape: tuple[int, int, int], density: float, dtype: torch.dtype, arch: int
) -> Tile:
    """Return the tile for one call: that of the nearest row, by distance of logarithms.

    op       key of the table; carries what must match exactly, as the 64 of "block_linear/64"
    shape    (M, N, K) of the product
    density  kept share, 1 where unknown
    dtype    of the operands
    arch     compute capability, 80 for 8.0

    Raises ValueError where the table has no row for op, dtype and arch.
    """
    here = _place(shape, density)
    rows = _rows(op, arch)
    best, least = None, math.inf
    for item_bytes, row_shape, row_density, tile in rows:
        distance = math.dist(here, _place(row_shape, row_density))
        if item_bytes == dtype.itemsize and distance < least:  # a tie goes to the earlier row
            best, least = tile, distance
    if best is None:
        raise ValueError(f"pick_tile: no tile for {op} with {dtype} on compute capability {arch}")
    return Tile(*best)


def listed_tiles(op: str, arch: int, item_bytes: int) -> list[Tile]:
    """Return every tile that pick_tile can give for one op, capability and element size."""
    found = (Tile(*tile) for size, _, _, tile in _rows(op, arch) if size == item_bytes)
    return list(dict.fromkeys(found))
