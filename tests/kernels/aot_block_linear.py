"""Cases of block_linear and its gradients for aot_check.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from machine_code import Case

from liveweight.kernels import block_linear, block_linear_grad, epilogue
from liveweight.kernels.tiles import Tile, listed_tiles, section_of

# float16 compiles to the code of bfloat16 with other type names.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NARROW, BROAD = 16, 128  # a step takes several blocks of the one side, a part of one of the other


def cases(arch: int) -> Iterator[Case]:
    if arch in (80, 90):
        yield finish_case(arch)
    for side in block_linear.SIDES:
        if section_of(f"block_linear/{side}", arch) != arch:
            continue
        for name, dtype in DTYPES.items():
            for tile in distinct(f"block_linear/{side}", arch, dtype):
                yield from panel_cases(arch, name, dtype, side, tile)
            for tile in distinct(f"block_linear_grad_values/{side}", arch, dtype):
                yield from sampled_cases(arch, name, dtype, side, tile)


def finish_case(arch: int) -> Case:
    signature = {"work_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    return Case(
        op="sum of parts",
        variant="bf16 from 4 parts, GELU",
        function=epilogue.finish_kernel,
        arch=arch,
        signature=signature | {"count": "i32", "N": "i32"},
        constants={"PARTS": 4, "HAS_BIAS": True, "ACTIVATION": 2, "ENTRIES": 1024},
        tile=Tile(1, 1024, 1, warps=4, stages=3),
        multiples=("count", "N"),
        wide=4,
    )


def distinct(op: str, arch: int, dtype: torch.dtype) -> list[Tile]:
    """Return the tiles of an op; into how many parts beyond one the walk is cut is all one."""
    tiles = listed_tiles(op, arch, dtype.itemsize)
    return list(dict.fromkeys(dataclasses.replace(t, split=min(t.split, 2)) for t in tiles))


def panel_cases(arch: int, name: str, dtype: torch.dtype, panel: int, tile: Tile) -> Iterator[Case]:
    yield panel_case(arch, name, dtype, panel, tile, NARROW, turned=False)
    # sm_86 has the code of sm_80 but for its name; parts differ from wholes in the epilogue.
    if arch != 86 and tile.split == 1:
        yield panel_case(arch, name, dtype, panel, tile, BROAD, turned=True)
    if name == "bf16" and arch != 86 and tile.m == panel == 64:
        yield panel_case(arch, name, dtype, panel, tile, BROAD, turned=False, even_k=False)
        yield panel_case(arch, name, dtype, panel, tile, 32, turned=True, even_k=False)
    if tile.tma:
        yield panel_case(arch, name, dtype, panel, tile, BROAD, turned=False)
    if name == "fp32" and arch != 86 and tile.m > 64:
        yield panel_case(arch, name, dtype, panel, tile, BROAD, turned=False, way="tf32")


def panel_case(
    arch: int, name: str, dtype: torch.dtype, panel: int, tile: Tile, chunk: int, *,
    turned: bool, way: str | None = None, even_k: bool = True,
) -> Case:  # fmt: skip
    tma, parts = tile.tma and tile.k <= chunk, tile.split
    signature = dict.fromkeys(("x", "values", "bias_ptr"), f"*{name}")
    signature["y_ptr"] = "*fp32" if parts > 1 else f"*{name}"
    signature |= {f"{n}_ptr": "*i32" for n in ("offsets", "list", "blocks", "order")}
    signature |= dict.fromkeys(("M", "N", "K", "panels"), "i32")
    if tma:
        box = [panel, tile.k] if turned else [tile.k, panel]
        signature["x"] = f"tensordesc<{name}{[tile.m, tile.k]}>"
        signature["values"] = f"tensordesc<{name}{box}>"
    last = parts == 1 and not turned  # the gradient and parts have no bias and no activation
    way = way or block_linear.precision(dtype)
    constants = {
        "TURNED": turned, "CHUNK": chunk, "PANEL": panel, "EVEN_K": even_k, "HAS_BIAS": last,
        # GELU asks for the most registers, where there are many sums.
        "ACTIVATION": (2 if tile.m * panel > 128 * 64 else 1) if last else 0,
        "PRECISION": way, "PARTS": parts, "TMA": tma, "GROUP_M": 8,
        "BLOCK_M": tile.m, "BLOCK_K": tile.k,
    }  # fmt: skip
    if not last:
        del signature["bias_ptr"]
        constants["bias_ptr"] = None
    grad = " (grad_x)" if turned else ""
    ending = f"{', ' + way if name == 'fp32' else ''}{', parts' if parts > 1 else ''}"
    ending += "" if even_k else ", ragged K"
    sizes = ((tile.m, tile.k), (tile.k, panel if way != "tf32" or turned else 0))
    return Case(
        op=f"block_linear/{panel}",
        variant=f"{name}, {tile.m}x{panel}x{tile.k}, chunks of {chunk}{ending}{grad}",
        function=block_linear.panel_kernel,
        arch=arch,
        signature=signature,
        constants=constants,
        tile=dataclasses.replace(tile, tma=tma),
        multiples=("N", "K"),
        matrix_rows=tile.m,
        wide=0 if tma else wide_loads(tile, dtype.itemsize, sizes),
        flops=2 * tile.m * panel * tile.k,
        bytes=(tile.m + panel) * tile.k * dtype.itemsize,
    )


def wide_loads(tile: Tile, item_bytes: int, sizes: tuple[tuple[int, int], ...]) -> int:
    """Return how many 16-byte copies the pipeline needs at least: its stages' of each operand."""
    threads = 32 * tile.warps
    pieces = (rows * columns * item_bytes // 16 for rows, columns in sizes)
    return tile.stages * sum(count // threads for count in pieces)


def sampled_cases(arch: int, name: str, dtype: torch.dtype, bh: int, tile: Tile) -> Iterator[Case]:
    yield sampled_case(arch, name, dtype, bh, tile, NARROW)
    if tile.tma:
        yield sampled_case(arch, name, dtype, bh, tile, BROAD)


def sampled_case(arch: int, name: str, dtype: torch.dtype, bh: int, tile: Tile, bw: int) -> Case:
    tma, parts = tile.tma and tile.m <= bw, tile.split
    signature = dict.fromkeys(("grad", "x"), f"*{name}")
    signature["out_ptr"] = "*fp32" if parts > 1 else f"*{name}"
    signature |= {"offsets_ptr": "*i32", "columns_ptr": "*i32"}
    signature |= dict.fromkeys(("M", "N", "K", "rows", "size"), "i32")
    if tma:
        signature["x"] = f"tensordesc<{name}{[tile.k, tile.m]}>"
        signature["grad"] = f"tensordesc<{name}{[tile.k, bh]}>"
    constants = {
        "BH": bh, "BW": bw, "EVEN_N": True, "EVEN_K": True,
        "PRECISION": block_linear.precision(dtype), "PARTS": parts, "TMA": tma, "SEARCH": 256,
        "BLOCK_J": tile.m, "BLOCK_M": tile.k,
    }  # fmt: skip
    parted = ", parts" if parts > 1 else ""
    return Case(
        op=f"block_linear_grad_values/{bh}",
        variant=f"{name}, {tile.m}x{bh}x{tile.k}, blocks {bh}x{bw}{parted}",
        function=block_linear_grad.sampled_kernel,
        arch=arch,
        signature=signature,
        constants=constants,
        tile=dataclasses.replace(tile, tma=tma),
        multiples=("N", "K", "size"),
        matrix_rows=tile.m,
        wide=0 if tma else wide_loads(tile, dtype.itemsize, ((tile.m, tile.k), (tile.k, bh))),
        flops=2 * tile.m * bh * tile.k,
        bytes=(tile.m + bh) * tile.k * dtype.itemsize,
    )
