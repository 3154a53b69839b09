"""Cases of masked_linear and its gradients for aot_check.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from machine_code import Case

from liveweight.kernels import mask_bits, masked_linear, masked_linear_grad
from liveweight.kernels.launch import precision
from liveweight.kernels.tiles import Tile, listed_tiles, section_of

# float16 compiles to the code of bfloat16 with other type names.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORWARD, GRAD_X, GRAD_WEIGHT = (f"masked_linear{end}" for end in ("", "_grad_x", "_grad_weight"))


def cases(arch: int) -> Iterator[Case]:
    yield _packing(arch)
    for name, dtype in DTYPES.items():
        for op, build in ((FORWARD, _product), (GRAD_X, _product), (GRAD_WEIGHT, _grad)):
            if section_of(op, arch) != arch:
                continue
            for tile in listed_tiles(op, arch, dtype.itemsize):
                yield build(op, arch, name, tile, even=True)
                if arch in (80, 90) and name == "bf16" and not tile.tma:
                    yield build(op, arch, name, tile, even=False)
                if op != GRAD_WEIGHT and name == "bf16":
                    yield _lists(op, arch, tile)


def _packing(arch: int) -> Case:
    return Case(
        op="masked_linear, packing",
        variant="",
        function=mask_bits.pack_kernel,
        arch=arch,
        signature={
            "mask_ptr": "*i8",
            "bits_ptr": "*i32",
            "count": "i32",
            "K": "i32",
            "words": "i32",
        },
        constants={"WORDS": 256},
        tile=Tile(16, 16, 16, warps=4, stages=3),
        multiples=("K",),
        wide=4,
    )


def _operand(name: str, tma: bool, rows: int, columns: int) -> str:
    return f"tensordesc<{name}[{rows}, {columns}]>" if tma else f"*{name}"


def _variant(name: str, tile: Tile, even: bool) -> str:
    parts = [name, f"{tile.m}x{tile.n}x{tile.k}"]
    parts += [f"{tile.split} parts"] if tile.split > 1 else []
    parts += [] if even else ["ragged"]
    return ", ".join(parts + (["TMA"] if tile.tma else []))


def _copies(tile: Tile, item: int) -> int:
    """Return how many 16-byte copies of a thread bring both operands of a step."""
    return 0 if tile.tma else (tile.m + tile.n) * tile.k * item // (16 * 32 * tile.warps)


def _product(op: str, arch: int, name: str, tile: Tile, even: bool) -> Case:
    turned, item = op == GRAD_X, DTYPES[name].itemsize
    sides = (tile.k, tile.n) if turned else (tile.n, tile.k)
    bias = op == FORWARD and tile.split == 1
    signature = {
        "x": _operand(name, tile.tma, tile.m, tile.k),
        "weight": _operand(name, tile.tma, *sides),
        "y_ptr": f"*{name}" if tile.split == 1 else "*fp32",
    }
    signature |= dict.fromkeys(("bits_ptr", "lists_ptr", "counts_ptr"), "*i32")
    signature |= dict.fromkeys(("M", "N", "K", "words", "steps"), "i32")
    constants = {
        "TURNED": turned, "HAS_BIAS": bias, "EVEN": even, "EVEN_P": even or not turned,
        "PRECISION": precision(DTYPES[name]), "PACKED": item == 2, "TMA": tile.tma,
        "PARTS": tile.split, "GROUP_M": 8,
        "BLOCK_M": tile.m, "BLOCK_P": tile.n, "BLOCK_R": tile.k,
    }  # fmt: skip
    (signature if bias else constants)["bias_ptr"] = f"*{name}" if bias else None
    return Case(
        op=op,
        variant=_variant(name, tile, even),
        function=masked_linear.masked_product_kernel,
        arch=arch,
        signature=signature,
        constants=constants,
        tile=tile,
        multiples=("N", "K", "words") if even else ("N", "K"),
        matrix_rows=tile.n,
        copies=_copies(tile, item),
        flops=2 * tile.m * tile.n * tile.k,
        bytes=(tile.m + tile.n) * tile.k * item + tile.n * tile.k // 8,
    )


def _lists(op: str, arch: int, tile: Tile) -> Case:
    turned = op == GRAD_X
    rows, columns = (tile.k, tile.n) if turned else (tile.n, tile.k)
    together = mask_bits.tiles_together(rows, columns // 32)
    signature = dict.fromkeys(("bits_ptr", "lists_ptr", "counts_ptr"), "*i32")
    signature |= dict.fromkeys(("N", "K", "words", "steps"), "i32")
    return Case(
        op="masked_linear, lists of tiles",
        variant=f"{rows}x{columns}{', columns' if turned else ''}",
        function=mask_bits.list_tiles_kernel,
        arch=arch,
        signature=signature,
        constants={
            "TURNED": turned, "ROWS": rows, "WORDS": columns // 32, "TOGETHER": together,
        },
        tile=Tile(tile.m, tile.n, tile.k, warps=8, stages=3),
        multiples=("K", "words"),
        wide=0 if turned else 4,
    )  # fmt: skip


def _grad(op: str, arch: int, name: str, tile: Tile, even: bool) -> Case:
    item = DTYPES[name].itemsize
    signature = {
        "grad": _operand(name, tile.tma, tile.k, tile.m),
        "x": _operand(name, tile.tma, tile.k, tile.n),
        "bits_ptr": "*i32",
        "out_ptr": f"*{name}" if tile.split == 1 else "*fp32",
    }
    signature |= dict.fromkeys(("M", "N", "K", "words"), "i32")
    return Case(
        op=op,
        variant=_variant(name, tile, even),
        function=masked_linear_grad.masked_grad_kernel,
        arch=arch,
        signature=signature,
        constants={
            "EVEN_M": even, "EVEN_N": even, "EVEN_K": even, "PRECISION": precision(DTYPES[name]),
            "TMA": tile.tma, "PARTS": tile.split, "GROUP": 8,
            "BLOCK_N": tile.m, "BLOCK_K": tile.n, "BLOCK_M": tile.k,
        },
        tile=tile,
        multiples=("N", "K", "words") if even else ("N", "K"),
        matrix_rows=tile.m,
        copies=_copies(tile, item),
        flops=2 * tile.m * tile.n * tile.k,
        bytes=(tile.m + tile.n) * tile.k * item,
    )  # fmt: skip
