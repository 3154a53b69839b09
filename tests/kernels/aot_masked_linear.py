"""Cases of masked_linear for aot_check.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from machine_code import Case

from liveweight.kernels import masked_linear
from liveweight.kernels.tiles import Tile, listed_tiles, section_of

# float16 compiles to the code of bfloat16 with other type names.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def cases(arch: int) -> Iterator[Case]:
    if section_of("masked_linear", arch) != arch:
        return
    for name, dtype in DTYPES.items():
        for tile in listed_tiles("masked_linear", arch, dtype.itemsize):
            yield _product(arch, name, dtype, tile, even_k=True)
            if arch != 86 and name == "bf16":
                yield _product(arch, name, dtype, tile, even_k=False)
            yield _block_list(arch, tile)


def _product(arch: int, name: str, dtype: torch.dtype, tile: Tile, even_k: bool) -> Case:
    pointers = dict.fromkeys(("x", "weight", "bias", "y"), name)
    pointers |= dict.fromkeys(("mask_bits", "blocks", "counts"), "i32")
    signature = {f"{argument}_ptr": f"*{kind}" for argument, kind in pointers.items()}
    signature |= dict.fromkeys(("M", "N", "K", "words", "k_blocks"), "i32")
    constants = {
        "HAS_BIAS": True, "EVEN_K": even_k, "PRECISION": masked_linear.precision(dtype),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": 8,
    }  # fmt: skip
    return Case(
        op="masked_linear",
        variant=f"{name}, {tile.m}x{tile.n}x{tile.k}{'' if even_k else ', ragged K'}",
        function=masked_linear.masked_linear_kernel,
        arch=arch,
        signature=signature,
        constants=constants,
        tile=tile,
        multiples=("N", "K", "words"),
        matrix_rows=tile.m,
        wide=8,
        flops=2 * tile.m * tile.n * tile.k,
        bytes=(tile.m + tile.n) * tile.k * dtype.itemsize + tile.n * tile.k // 8,
    )


def _block_list(arch: int, tile: Tile) -> Case:
    pointers = ("mask_bits", "blocks", "counts")
    signature = {f"{name}_ptr": "*i32" for name in pointers}
    signature |= dict.fromkeys(("N", "words", "k_blocks"), "i32")
    return Case(
        op="masked_linear, block list",
        variant=f"{tile.n}x{tile.k}",
        function=masked_linear.list_blocks_kernel,
        arch=arch,
        signature=signature,
        constants={"BLOCK_N": tile.n, "WORDS": tile.k // 32, "STEP": 64},
        tile=Tile(tile.m, tile.n, tile.k, warps=4, stages=3),
        multiples=("N", "words"),
        wide=4,
    )
