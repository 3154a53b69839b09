"""What activity_stats_ must have become; no dense weights here, its bound is one read of x."""

from __future__ import annotations

from cuda_code import Expected

# Eight of 16 bits or four of 32 a load: four loads in flight, and at least one in the remainder.
EXPECTED = [
    Expected(kernel=r"column_stats<\w+, 1>", must_not=("LDG.128",), blocks=2),
    Expected(kernel=r"(column|run)_stats<", must=("LDG.128",), must_not=("ATOM", "RED"), blocks=2),
    Expected(kernel="combine_stats", must_not=("ATOM", "RED"), blocks=2),
]
