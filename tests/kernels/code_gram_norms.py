"""What gram_norms_ must have become: products of matrices on CUDA cores, then square roots."""

from __future__ import annotations

from cuda_code import Expected

EXPECTED = [
    # 3x3 kernels in one step, 11x11 kernels in many.
    Expected(kernel="sum_norms<false>", must=("FFMA", "LDS.128", "MUFU"), blocks=4, shared=28416),
    Expected(kernel="sum_norms<true>", must=("FFMA", "LDS.128", "MUFU"), blocks=2, shared=57088),
    Expected(kernel="add_norms", must_not=("ATOM", "RED"), blocks=4),
]
