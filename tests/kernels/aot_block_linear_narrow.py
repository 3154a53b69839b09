"""Cases of block_linear's kernel for narrow blocks for aot_check.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from machine_code import Case

from liveweight.kernels import block_linear_narrow
from liveweight.kernels.launch import precision
from liveweight.kernels.tiles import Tile, listed_tiles, section_of

# float16 compiles to the code of bfloat16 with other type names.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def cases(arch: int) -> Iterator[Case]:
    if arch == 80:
        yield turn_case(arch)
    for height in block_linear_narrow.HEIGHTS:
        op = f"block_linear_narrow/{height}"
        if section_of(op, arch) != arch:
            continue
        for name, dtype in DTYPES.items():
            if arch == 86 and name == "fp32":
                continue  # the code and the shared memory of sm_80
            tiles = listed_tiles(op, arch, dtype.itemsize)
            for tile in dict.fromkeys(dataclasses.replace(t, split=min(t.split, 2)) for t in tiles):
                yield narrow_case(op, arch, name, dtype, height, tile)


def narrow_case(op: str, arch: int, name: str, dtype: torch.dtype, height: int, tile: Tile) -> Case:
    whole = tile.split == 1  # parts have no bias and no activation
    signature = dict.fromkeys(("x_ptr", "values_ptr"), f"*{name}")
    signature["y_ptr"] = f"*{name}" if whole else "*fp32"
    signature |= {f"{n}_ptr": "*i32" for n in ("offsets", "columns", "order")}
    signature |= dict.fromkeys(("M", "K", "N", "stride", "panels"), "i32")
    constants = {
        "CHUNK": 1, "PANEL": height, "HAS_BIAS": whole, "ACTIVATION": 2 if whole else 0,
        "PRECISION": precision(dtype), "PARTS": tile.split, "TURNED": False,
        "BLOCK_M": tile.m, "BLOCK_K": tile.k, "GROUP_M": 8,
    }  # fmt: skip
    if whole:
        signature["bias_ptr"] = f"*{name}"
    else:
        constants["bias_ptr"] = None
    pieces = (tile.m + height) * tile.k * dtype.itemsize // 16
    return Case(
        op=op,
        variant=f"{name}, {tile.m}x{height}x{tile.k}{'' if whole else ', parts'}",
        function=block_linear_narrow.narrow_kernel,
        arch=arch,
        signature=signature,
        constants=constants,
        tile=tile,
        multiples=("K", "N", "stride"),
        matrix_rows=height if height >= 64 else tile.m,
        wide=tile.stages * pieces // (32 * tile.warps),
        flops=2 * tile.m * height * tile.k,
        bytes=(tile.m + height) * tile.k * dtype.itemsize,
    )


def turn_case(arch: int) -> Case:
    return Case(
        op="block_linear_narrow, turn",
        variant="bf16",
        function=block_linear_narrow.turn_kernel,
        arch=arch,
        signature={"x_ptr": "*bf16", "out_ptr": "*bf16", "M": "i32", "K": "i32", "stride": "i32"},
        constants={"SIDE": 64},
        tile=Tile(64, 64, 0, warps=4, stages=1),
        multiples=("M", "K", "stride"),
        wide=4,
    )
