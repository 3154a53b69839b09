"""block_linear in Triton: y = act(x W^T + b) for a weight W of which only whole blocks are kept.

The kept blocks of one row of blocks are, side by side, a dense matrix. A program multiplies a tile
of x's rows by that matrix, the panel, and takes x chunk by chunk at the columns that the panel
keeps. The gradient to the input is the same walk over the turned list: chunks of the output's
gradient, panels of columns of blocks, so one kernel serves both.

Floor: the longest of 2 M kept bw bh / the tensor cores' rate, the bytes of x, values and y / the
memory's, and, where M is large, the bytes read through the L2 cache / its rate: a tile of m samples
reads m + panel numbers for m * panel products, whatever the sparsity. In bf16 that is 15 FLOP/byte
for panels of 16 and m = 256, 28 for 32, 51 for 64, 85 for 128, so short panels are bound by the
reads of x. The same mask stored with taller panels (more rows a block, the union of their columns)
reads x once for all of them and can be faster, although it multiplies zeros.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .epilogue import finish
from .launch import (
    DTYPES,
    align_rows,
    arch_of,
    cdiv,
    check_dtype,
    check_operand,
    precision,
    tma_reads,
)
from .panels import panel_kernel
from .tiles import Tile, pick_tile

__all__ = ["DTYPES", "SIDES", "launch", "launch_grad_x", "serves"]

SIDES = (16, 32, 64, 128)  # of the blocks that have a kernel
PART_STEPS = 4  # that a part has at least: adding parts up is a launch of its own
_GROUP_M = 8  # tiles of x's rows that go through the panels together


def serves(values: Tensor) -> bool:
    """Return whether blocks [kept, bw, bh] have sides that the kernels are made for."""
    return values.shape[1] in SIDES and values.shape[2] in SIDES


def launch(
    x: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, schedule: Tensor,
    shape: tuple[int, int], bias: Tensor | None = None, activation: int = 0,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Return act(x W^T + bias).

    x            [M, K] contiguous, float16, bfloat16 or float32
    values       [kept, bw, bh] contiguous, dtype of x; sides of blocks in SIDES
    row_offsets  [rows + 1] int32, rows = ceil(N / bh)
    columns      [kept] int32 in [0, width), width = ceil(K / bw)
    schedule     int32 of formats.schedule.make_schedule
    shape        (N, K)
    bias         [N], dtype of x, or None
    activation   0 none, 1 ReLU, 2 GELU, 3 its tanh form
    tile         block sizes; None takes pick_tile's
    returns      [M, N], accumulated in float32, cast to x.dtype

    float32 as in launch.precision. Deterministic; runs on the current stream. Raises TypeError and
    ValueError where an operand does not fit; what the indices hold is not looked at. Where K is no
    multiple of 16, a padded copy of x is read.
    """
    M, N = x.shape[0], shape[0]
    rows, width = _check("block_linear", values, row_offsets, columns, schedule, shape)
    check_operand("block_linear", "x", x, (M, shape[1]), values, values.dtype)
    if bias is not None:
        check_operand("block_linear", "bias", bias, (N,), values, values.dtype)
    tile = tile or _pick(x, values, values.shape[2], N, rows * width)
    index = (row_offsets, columns, columns, schedule)
    return _multiply(x, values, index, N, bias, activation, tile, turned=False)


def launch_grad_x(
    grad: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, schedule: Tensor,
    shape: tuple[int, int], tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Return grad W [M, K] for grad [M, N] contiguous; the other arguments are those of launch."""
    M, K, (kept, bw, _) = grad.shape[0], shape[1], values.shape
    rows, width = _check("block_linear_grad_x", values, row_offsets, columns, schedule, shape)
    check_operand("block_linear_grad_x", "grad", grad, (M, shape[0]), values, values.dtype)
    tile = tile or _pick(grad, values, bw, K, rows * width)
    sizes = [rows, width, width + 1, kept, kept]
    _, order, offsets, blocks, rows_of = schedule.split(sizes)
    return _multiply(grad, values, (offsets, rows_of, blocks, order), K, None, 0, tile, turned=True)


def _check(
    op: str, values: Tensor, row_offsets: Tensor, columns: Tensor, schedule: Tensor,
    shape: tuple[int, int],
) -> tuple[int, int]:  # fmt: skip
    """Return the rows and columns of blocks; raise unless the parts of W fit each other."""
    check_dtype(op, "values", values)
    if values.dim() != 3 or not serves(values):
        raise ValueError(f"{op}: expected sides in {SIDES}, got values {tuple(values.shape)}")
    kept, bw, bh = values.shape
    rows, width = cdiv(shape[0], bh), cdiv(shape[1], bw)
    check_operand(op, "values", values, (kept, bw, bh), values, values.dtype)
    scheduled = rows + width + (width + 1) + 2 * kept
    for name, index, size in (
        ("row_offsets", row_offsets, rows + 1),
        ("columns", columns, kept),
        ("schedule", schedule, scheduled),
    ):
        check_operand(op, name, index, (size,), values, torch.int32)
    return rows, width


def _pick(x: Tensor, values: Tensor, panel: int, N: int, blocks: int) -> Tile:
    """Return the tile for a call, whose row may be far from it: parts too short are not cut.

    The turned walk is the same walk, and takes the same tiles.
    """
    density = values.shape[0] / max(blocks, 1)
    shape = (x.shape[0], N, x.shape[1])
    tile = pick_tile(f"block_linear/{panel}", shape, density, x.dtype, arch_of(x))
    if tile.split == 1:
        return tile
    steps = values.numel() // (panel * tile.k * max(cdiv(N, panel), 1))  # of a panel, on average
    return dataclasses.replace(tile, split=min(tile.split, max(steps // PART_STEPS, 1)))


def _multiply(
    x: Tensor, values: Tensor, index: tuple[Tensor, ...], N: int, bias: Tensor | None,
    activation: int, tile: Tile, *, turned: bool,
) -> Tensor:  # fmt: skip
    """Return act(x W^T + bias) [M, N]; index = (offsets, list, blocks, order) of the panels."""
    chunk, panel = values.shape[1:] if not turned else values.shape[:0:-1]
    x = align_rows(x, chunk)
    (M, K), kept = x.shape, values.shape[0]
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    panels = cdiv(N, panel)
    # A panel is not cut into more parts than it has blocks, on average; a power of two, as every
    # number is a compilation.
    parts = 1 << (min(tile.split, max(kept // panels, 1)).bit_length() - 1)
    out = y if parts == 1 else x.new_empty(parts, M, N, dtype=torch.float32)
    tma = tile.tma and tile.k <= chunk and kept > 0 and tma_reads(x) and tma_reads(values)
    operands = _describe(x, values, tile, panel, turned) if tma else (x, values)
    ends = (None, 0) if parts > 1 else (bias, activation)
    with torch.cuda.device_of(x):
        panel_kernel[(cdiv(M, tile.m) * panels, parts)](
            *operands, *index, ends[0], out, M, K, N, panels,
            TURNED=turned, CHUNK=chunk, PANEL=panel, EVEN_K=K % chunk == 0,
            HAS_BIAS=ends[0] is not None, ACTIVATION=ends[1], PRECISION=precision(x.dtype),
            PARTS=parts, TMA=tma, GROUP_M=_GROUP_M, BLOCK_M=tile.m, BLOCK_K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if parts > 1:
        finish(out, y, bias, activation)
    return y


def _describe(
    x: Tensor, values: Tensor, tile: Tile, panel: int, turned: bool
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Return descriptors of x and of values [kept * bw, bh], and the boxes they are read in."""
    matrix, box = values.flatten(0, 1), [panel, tile.k] if turned else [tile.k, panel]
    of_x = TensorDescriptor.from_tensor(x, [tile.m, tile.k])
    return of_x, TensorDescriptor.from_tensor(matrix, box)
