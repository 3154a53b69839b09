"""What the kernels of semi_structured_linear must have become.

The main loop is written for two phases, in each of which a thread handles 64 weights of each of
its warp's tiles; the copies of x that stand in it are counted once around their own loop.
"""

from __future__ import annotations

from cuda_code import Expected


def few_tokens(groups: int, row_tiles: int, row_warps: int, **facts) -> Expected:
    """FewConfig<groups, row_tiles, row_warps> of semi_structured_plan.cuh."""
    return Expected(
        kernel=rf"multiply_few_tokens<.*FewConfig<{groups}, {row_tiles}, {row_warps}>",
        must=("HMMA.SP", "LDG.128", "LDG.64", "LDGSTS.128", "LDSM"),
        must_not=("ATOM", "RED"),
        loop="HMMA.SP",
        per_loop=8 * groups * row_tiles,
        weights=128 * row_tiles,
        budget=7.8,
        **facts,
    )


EXPECTED = [
    few_tokens(1, 1, 1, shared=33024, blocks=3, most=2.6),
    few_tokens(1, 2, 1, shared=33024, blocks=2, most=1.6),
    few_tokens(2, 2, 1, shared=66048, blocks=2, most=1.7),
    few_tokens(4, 2, 2, shared=66560, blocks=1, most=1.9),
    few_tokens(8, 2, 4, shared=73728, blocks=1, most=2.4),
    Expected(kernel="finish_few_tokens|align_rows", must_not=("ATOM", "RED"), blocks=4),
]
