"""What packing 2:4 weights, its inverse and the sampling of gradients must have become."""

from __future__ import annotations

from cuda_code import Expected

EXPECTED = [
    Expected(kernel="pack_semi_structured", must=("LDG.64", "STG.128"), blocks=2),
    Expected(kernel="move_semi_structured<true>", must=("LDG.64", "STG.128"), blocks=2),
    Expected(kernel="move_semi_structured<false>", must=("LDG.128", "STG.64"), blocks=4),
]
