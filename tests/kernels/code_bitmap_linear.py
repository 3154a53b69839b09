"""What the kernels of bitmap_linear must have become: fragments decoded at memory speed.

A lane decodes 128 weights of a tile of 32 x 128. On an H200 a weight of 50, 70 % sparsity comes
from memory in the time of 7.8, 5.0 instructions.
"""

from __future__ import annotations

from cuda_code import Expected

_PRODUCT = ("HMMA", "LDGSTS.128", "LDS.128", "LDG.128", "IDP")


def _product(groups: int, threads: int, most: float) -> Expected:
    # Two slots of a weight kept at 50 % for each of 16 or 8 warps, and their maps.
    shared = threads // 32 * (2 * (512 + 4400 + 16) + 1088)
    return Expected(
        kernel=f"bitmap_product<(Bf16|Half), {groups}>", must=_PRODUCT, blocks=1, shared=shared,
        loop="HMMA", per_loop=16 * groups, weights=128, budget=5.0, most=most, archs=("sm_90a",),
    )  # fmt: skip


EXPECTED = [
    _product(1, 512, 5.1),
    _product(2, 512, 5.5),
    _product(4, 512, 6.0),
    _product(8, 256, 7.2),
    Expected(kernel="bitmap_product<", must=_PRODUCT, blocks=1, archs=("sm_80",)),
    Expected(kernel="bitmap_sample<", must=("HMMA", "LDSM"), blocks=2, shared=72 << 10),
    Expected(kernel="bitmap_expand|bitmap_gather", blocks=4),
    Expected(kernel="bitmap_finish|bitmap_pad|activate_elements", blocks=4),
]
