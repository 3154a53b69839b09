"""Cases of block_conv2d and its gradients for aot_check.py: 3x3 kernels of stride and padding 1."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from machine_code import Case

from liveweight.kernels import block_conv2d, block_conv2d_grad_values, block_conv2d_grad_x
from liveweight.kernels.block_conv2d_checks import SIDES
from liveweight.kernels.launch import precision
from liveweight.kernels.tiles import Tile, listed_tiles, section_of

# float16 compiles to the code of bfloat16 with other type names.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FUNCTIONS = {
    "block_conv2d": block_conv2d.block_conv2d_kernel,
    "block_conv2d_grad_x": block_conv2d_grad_x.block_conv2d_grad_x_kernel,
    "block_conv2d_grad_values": block_conv2d_grad_values.block_conv2d_grad_values_kernel,
}
# Whose rows of the table an op takes.
ROWS = {op: op.removesuffix("_grad_x") for op in FUNCTIONS}
INDICES = ("offsets", "columns", "blocks", "rows", "order")
# Arguments that the JIT turns into constants where they are 1.
ONES = ("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w")
ONES += ("every_h", "every_w")


def cases(arch: int) -> Iterator[Case]:
    for op in FUNCTIONS:
        for side in SIDES:
            key = f"{ROWS[op]}/{side}"
            if section_of(key, arch) != arch:
                continue
            for name, dtype in DTYPES.items():
                for tile in listed_tiles(key, arch, dtype.itemsize):
                    yield _case(op, side, arch, name, dtype, tile, max(side, tile.k))
                    narrow = name == "bf16" and arch != 86 and tile.split == 1
                    if narrow and not op.endswith("values"):
                        # Narrow chunks: several taps a step.
                        yield _case(op, side, arch, name, dtype, tile, 16)
    if arch in (80, 90):
        for op, row in ROWS.items():
            tile = listed_tiles(f"{row}/64", arch, 2)[-1]
            yield _case(op, 64, arch, "bf16", torch.bfloat16, tile, 64, plain=False)


def _case(
    op: str, panel: int, arch: int, name: str, dtype: torch.dtype, tile: Tile, chunk: int,
    plain: bool = True,
) -> Case:  # fmt: skip
    """plain: stride 1, one group, sides that blocks divide; otherwise none of the three."""
    function, vector = FUNCTIONS[op], 16 // dtype.itemsize
    constants = {
        "KH": 3, "KW": 3, "CHUNK": chunk, "PANEL": panel, "GROUPS": 1 if plain else 2,
        "STRIDED": not plain, "EVEN_C": plain, "EVEN_N": plain, "VECTOR": vector,
        "HAS_BIAS": tile.split == 1, "ACTIVATION": int(tile.split == 1),
        "PRECISION": precision(dtype), "PARTS": tile.split, "BLOCK_M": tile.m, "BLOCK_K": tile.k,
        "GROUP_M": block_conv2d.GROUP_M,
    }  # fmt: skip
    constants |= {n: 1 for n in ONES if plain or n.startswith(("padding", "dilation"))}
    constants = {n: v for n, v in constants.items() if n in function.arg_names}
    result = "y_ptr" if op == "block_conv2d" else "out_ptr"
    signature = {}
    for argument in function.arg_names:
        if argument.removesuffix("_ptr") in INDICES and argument.endswith("_ptr"):
            signature[argument] = "*i32"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument == result and tile.split > 1 else f"*{name}"
        elif argument not in constants:
            signature[argument] = "i32"
    size = f"{tile.m}x{panel}x{tile.k}{f', {tile.split} parts' if tile.split > 1 else ''}"
    return Case(
        op=f"{op}/{panel}",
        variant=f"{name}, {size}, chunks of {chunk}{'' if plain else ', strides, groups, ragged'}",
        function=function,
        arch=arch,
        signature=signature,
        constants=constants,
        tile=tile,
        multiples=("C", "N", "channels"),
        matrix_rows=tile.m,
        # Of each operand one copy at least, in every stage but the last; the compiler may merge.
        wide=4,
        flops=2 * tile.m * panel * tile.k,
        bytes=(tile.m + panel) * tile.k * dtype.itemsize,
    )
