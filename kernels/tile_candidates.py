"""Which tiles are worth timing for one row of the table: those that could be the best.

Sides are powers of two. Left out is what cannot win: sums that do not fit the registers, pipelines
that do not fit the shared memory, tiles taller than the product or much lower, and cutting where
there are programs enough for every multiprocessor.
"""

from __future__ import annotations

import dataclasses
import math

from .tiles import Tile, shared_limit

_MOST_SUMS = 128  # fp32 sums that one thread holds
_ENOUGH = 132  # programs that keep a large GPU busy
_MOST_PARTS = 16
_HEIGHTS = (16, 32, 64, 128, 256)
_CHOICES = 3  # of heights, the tallest that the product fills


@dataclasses.dataclass(frozen=True)
class _Family:
    """How the kernels of one op see (M, N, K) of a row: sides cut into m and n, and the walk."""

    rows: int
    columns: int
    walk: int
    widths: tuple[int, ...] = ()  # of n; without them n is the panel named by the op
    tma: bool = True
    thinned: str = ""  # side of which only the kept share counts: "rows" or "walk"


_FAMILIES = {
    "masked_linear": _Family(0, 1, 2, (64, 128, 256)),
    "masked_linear_grad_x": _Family(0, 1, 2, (64, 128, 256)),
    "masked_linear_grad_weight": _Family(0, 1, 2, (64, 128, 256)),
    "block_linear": _Family(0, 1, 2, thinned="walk"),
    "block_linear_narrow": _Family(0, 1, 2, tma=False, thinned="walk"),
    "block_linear_grad_values": _Family(1, 0, 2, thinned="rows"),
    "block_conv2d": _Family(0, 1, 2, tma=False, thinned="walk"),
    "block_conv2d_grad_values": _Family(2, 1, 0, tma=False, thinned="rows"),
}


def candidates(
    op: str, shape: tuple[int, int, int], density: float, item_bytes: int, arch: int
) -> list[Tile]:
    """Return the tiles to time for one row of the table, in a fixed order.

    Raises ValueError for an op that has no family of tiles.
    """
    name, _, panel = op.partition("/")
    family = _FAMILIES.get(name)
    if family is None:
        raise ValueError(f"candidates: no tiles are known for {op}; known: {', '.join(_FAMILIES)}")
    widths = family.widths or (int(panel),)
    sides = {part: shape[getattr(family, part)] for part in ("rows", "columns", "walk")}
    if family.thinned:
        sides[family.thinned] = math.ceil(sides[family.thinned] * density)
    kinds = (False, True) if family.tma and arch >= 90 and item_bytes == 2 else (False,)
    return [
        Tile(m, n, k, warps, stages, split, tma)
        for m in [m for m in _HEIGHTS if m < 2 * max(sides["rows"], 16)][-_CHOICES:]
        for n in widths
        for warps in [_warps(m * n, item_bytes)]
        if m * n <= _MOST_SUMS * 32 * warps
        for k in ((64, 128) if arch >= 90 and item_bytes == 2 else (32, 64))
        for stages in _stages((m + n) * k * item_bytes, arch)
        for split in _splits(m, n, k, sides)
        for tma in kinds
        # Descriptors pay where many tokens make the operands' way the limit.
        if not tma or (m >= 64 and split == 1)
    ]


def _warps(sums: int, item_bytes: int) -> int:
    # Exact float32 products hold each operand in two parts, which takes registers.
    return 2 if sums <= 512 else 4 if sums <= 64 * (128 if item_bytes == 2 else 64) else 8


def _stages(step_bytes: int, arch: int) -> list[int]:
    """Return the two deepest pipelines that fit; a little is left for what else is shared."""
    most = (shared_limit(arch) - (4 << 10)) // step_bytes
    return [stages for stages in (2, 3, 4, 5) if stages <= most][-2:]


def _splits(m: int, n: int, k: int, sides: dict[str, int]) -> list[int]:
    """Return the fewest parts that make programs enough, and twice as many, down to four steps."""
    programs = -(-sides["rows"] // m) * -(-sides["columns"] // n)
    parts = 1
    while programs * parts < _ENOUGH and parts < _MOST_PARTS:
        parts *= 2
    steps = -(-sides["walk"] // k)
    few = [p for p in (parts, 2 * parts) if 4 * p <= steps and p <= _MOST_PARTS]
    return (few if parts > 1 else few[:1]) or [1]
