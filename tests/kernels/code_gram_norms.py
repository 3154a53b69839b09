"""What gram_norms_ must have become: products of matrices on CUDA cores, then square roots."""

from __future__ import annotations

from cuda_code import Expected

EXPECTED = [
    # 3x3 kernels; the taps of larger ones take more shared memory.
    Expected(kernel="sum_norms", must=("FFMA", "LDS.128", "MUFU"), blocks=4, shared=28416),
    Expected(kernel="add_norms", must_not=("ATOM", "RED"), blocks=4),
]
