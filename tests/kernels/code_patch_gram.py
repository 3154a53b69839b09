"""What patch_gram must have become: its bound is one read of x and 13 products a pixel."""

from __future__ import annotations

from cuda_code import Expected

EXPECTED = [
    # 12 warps: few, but each has 13 sums of four columns to add to and 16 loads in flight.
    Expected(kernel="lag_gram<", must=("FFMA", "LDS", "LDG"), blocks=3, shared=31680),
    Expected(kernel="tile_gram<", must=("FFMA", "LDS", "LDG"), blocks=4, shared=39936),
    Expected(kernel="sum_parts", must_not=("ATOM", "RED"), blocks=4),
]
