"""What the kernels of kernelwise_conv2d must have become.

In place of dense weights, products of one kept weight and one output: a lane's patch takes
K * K * rows * 4 of them per kept kernel. The budget is what strict fp32 at 75 % needs to be 2.2
times as fast as a dense convolution at three quarters of the FFMA rate.
"""

from __future__ import annotations

from cuda_code import Expected

SHARED = 99 << 10  # the most that a plan asks for


def tile(size: int, stride: int, rows: int, most: float) -> list[Expected]:
    """conv_tile<size, stride, rows>; sm_80 has shared memory for one block of eight warps."""
    products = size * size * rows * 4
    return [
        Expected(
            kernel=rf"conv_tile<{size}, {stride}, {rows}>",
            must=("FFMA", "LDS.64", "LDGSTS", "STG.128"),
            must_not=("ATOM", "RED"),
            blocks=blocks,
            shared=SHARED,
            loop="FFMA",
            per_loop=products,
            weights=products,
            budget=2.4,
            most=most,
            archs=(arch,),
        )
        for arch, blocks in (("sm_80", 1), ("sm_90a", 2))
    ]


EXPECTED = [
    *tile(3, 1, 8, most=1.25),
    *tile(3, 1, 7, most=1.26),
    *tile(3, 1, 4, most=1.36),
    *tile(5, 1, 4, most=1.25),
    *tile(3, 2, 4, most=1.6),
    *tile(1, 1, 8, most=2.2),
    *tile(1, 1, 7, most=2.3),
    *tile(1, 1, 4, most=3.2),
    Expected(kernel="conv_direct", must=("FFMA",), must_not=("ATOM", "RED"), blocks=4),
    Expected(kernel="widen_elements", must=("LDG.128", "STG.128"), blocks=4),
]
