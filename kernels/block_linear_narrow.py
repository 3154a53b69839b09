"""block_linear in Triton for blocks that are narrow: panels of rows by 1, 2, 4 or 8 columns.

Tall panels read x least often, and narrow ones ask no neighbouring columns to go together: blocks
of 64 x 1 cost no more accuracy than those of 16 x 16 (benchmarks/results/structure); V:N:M masks
are such panels. In x [M, K] the columns that a panel keeps are scattered numbers; in x turned,
[K, M], each is a row of neighbours. So x is turned first, one read and one write of it, unless it
lies turned already (batch_last), and a program gathers whole rows. Panels of 64 rows and more are
the first operand, so that few tokens fill a tile; smaller ones the second.

Floor: that of the same number of kept weights in blocks as tall, plus the bytes of turning x.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import activate, finish
from .launch import arch_of, cdiv, check_dtype, check_operand, precision
from .panels import find_place, find_share
from .tiles import Tile, pick_tile

HEIGHTS = (16, 32, 64, 128)  # of the blocks that have a kernel
WIDTHS = (1, 2, 4, 8)
_PART_BYTES = 64 << 10  # of a panel's values that a part has at least: adding up is a launch
_GROUP_M = 8  # tiles of tokens that go through the panels together
_ALIGNED = 16  # tokens; rows of the turned x begin at multiples of it
_TURN = 64  # rows and columns of a tile that is turned
_PLAIN = ["offsets_ptr", "columns_ptr", "order_ptr"]  # views at any place of a tensor


@triton.jit
def turn_kernel(x_ptr, out_ptr, M, K, stride, SIDE: tl.constexpr):
    """out [K, stride] = x [M, K] turned; columns from M on are zero."""
    m = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    k = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    inside = (m < M)[:, None] & (k < K)[None, :]
    tile = tl.load(x_ptr + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
    at = out_ptr + k.to(tl.int64)[:, None] * stride + m[None, :]
    tl.store(at, tl.trans(tile), mask=(k < K)[:, None] & (m < stride)[None, :])


@triton.jit(do_not_specialize=["M", "panels"], do_not_specialize_on_alignment=_PLAIN)
def narrow_kernel(
    x_ptr, values_ptr, offsets_ptr, columns_ptr, order_ptr, bias_ptr, y_ptr,
    M, K, N, stride, panels,
    CHUNK: tl.constexpr, PANEL: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y: BLOCK_M tokens of x [K, stride] by a panel, or by a part of it.

    y is [PARTS, M, N], or [N, M] where TURNED.
    """
    TOGETHER: tl.constexpr = BLOCK_K // CHUNK
    WEIGHT_FIRST: tl.constexpr = PANEL >= 64  # the first operand wants 64 rows on sm_90
    first_m, panel = find_place(tl.program_id(0), M, panels, order_ptr, BLOCK_M, GROUP_M)
    part = tl.program_id(1)
    first, last = find_share(offsets_ptr, panel, part, PARTS, TOGETHER)
    m = first_m + tl.arange(0, BLOCK_M)
    n = tl.arange(0, PANEL)
    k = tl.arange(0, BLOCK_K)

    # The columns of a step are loaded one step ahead: inside a step they would be the address of
    # another load, on which the compiler spends half of its pipeline.
    place = first + k // CHUNK
    column = tl.load(columns_ptr + place, mask=place < last, other=0) * CHUNK + k % CHUNK
    if WEIGHT_FIRST:
        acc = tl.zeros((PANEL, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, PANEL), tl.float32)
    for step in range(tl.cdiv(last - first, TOGETHER)):
        inside = (place < last) & (column < K)  # the last column of blocks may be ragged
        at = (first + step * TOGETHER).to(tl.int64) * (CHUNK * PANEL)
        # The first operand is turned by its addresses: sm_80 copies it asynchronously only so.
        if WEIGHT_FIRST:
            x = tl.load(
                x_ptr + column.to(tl.int64)[:, None] * stride + m[None, :],
                mask=inside[:, None] & (m < stride)[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(
                values_ptr + at + n[:, None] + k[None, :] * PANEL, mask=(place < last)[None, :],
                other=0.0,
            )  # fmt: skip
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
        else:
            x = tl.load(
                x_ptr + m[:, None] + column.to(tl.int64)[None, :] * stride,
                mask=(m < stride)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(
                values_ptr + at + k[:, None] * PANEL + n[None, :], mask=(place < last)[:, None],
                other=0.0,
            )  # fmt: skip
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        place += TOGETHER
        column = tl.load(columns_ptr + place, mask=place < last, other=0) * CHUNK + k % CHUNK

    if WEIGHT_FIRST:
        acc = tl.trans(acc)
    n += panel * PANEL
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    if TURNED:
        at = n.to(tl.int64)[None, :] * M + m[:, None]
    else:
        at = (part * tl.cast(M, tl.int64) + m)[:, None] * N + n[None, :]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def serves(values: Tensor) -> bool:
    """Return whether blocks [kept, bw, bh] have sides that the kernel is made for."""
    return values.shape[1] in WIDTHS and values.shape[2] in HEIGHTS


def turn(x: Tensor) -> Tensor:
    """Return x [M, K] turned: [K, stride], stride the next multiple of 16 from M on.

    x is contiguous, or x.t() is: that is taken as it lies where M is a multiple of 16.
    """
    M, K = x.shape
    stride = cdiv(M, _ALIGNED) * _ALIGNED
    if stride == M and x.t().is_contiguous() and x.data_ptr() % 16 == 0:
        return x.t()
    x = x.contiguous()
    out = x.new_empty(K, stride)
    grid = (cdiv(stride, _TURN), cdiv(K, _TURN))
    with torch.cuda.device_of(x):
        turn_kernel[grid](x, out, M, K, stride, SIDE=_TURN, num_warps=4)
    return out


def launch(
    x: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, schedule: Tensor,
    shape: tuple[int, int], bias: Tensor | None = None, activation: int = 0,
    batch_last: bool = False, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Return act(x W^T + bias) [M, N]; with batch_last its transpose is contiguous.

    x            [M, K], float16, bfloat16 or float32, contiguous or turned
    values       [kept, bw, bh] contiguous, dtype of x; bw in WIDTHS, bh in HEIGHTS
    row_offsets, columns, schedule, shape, bias, activation, tile   as of block_linear.launch

    Raises TypeError and ValueError where an operand does not fit.
    """
    op, (M, K), N = "block_linear", x.shape, shape[0]
    check_dtype(op, "values", values)
    if values.dim() != 3 or not serves(values):
        raise ValueError(f"{op}: expected blocks of {HEIGHTS} x {WIDTHS}, got values "
                         f"{tuple(values.shape)}")  # fmt: skip
    kept, bw, bh = values.shape
    rows, width = cdiv(N, bh), cdiv(K, bw)
    if x.dtype != values.dtype:
        raise TypeError(f"{op}: expected x {values.dtype}, got {x.dtype}")
    if shape[1] != K or x.device != values.device:
        raise ValueError(f"{op}: expected x [M, {shape[1]}] on {values.device}, got "
                         f"{tuple(x.shape)} on {x.device}")  # fmt: skip
    check_operand(op, "values", values, (kept, bw, bh), values, values.dtype)
    for name, index, size in (
        ("row_offsets", row_offsets, rows + 1), ("columns", columns, kept),
        ("schedule", schedule, rows + width + width + 1 + 2 * kept),
    ):  # fmt: skip
        check_operand(op, name, index, (size,), values, torch.int32)
    if bias is not None:
        check_operand(op, "bias", bias, (N,), values, values.dtype)
    if M * N == 0:
        return x.new_empty(N, M).t() if batch_last else x.new_empty(M, N)
    if tile is None:
        density = kept / max(rows * width, 1)
        tile = pick_tile(f"block_linear_narrow/{bh}", (M, N, K), density, x.dtype, arch_of(x))
        # More parts than this are not worth adding up again.
        each = values.numel() * values.element_size() // rows
        tile = dataclasses.replace(tile, split=min(tile.split, max(each // _PART_BYTES, 1)))
    return _multiply(turn(x), values, (row_offsets, columns, schedule), (M, N, K), bias,
                     activation, batch_last, tile)  # fmt: skip


def _multiply(
    x: Tensor, values: Tensor, index: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, int, int],
    bias: Tensor | None, activation: int, batch_last: bool, tile: Tile,
) -> Tensor:  # fmt: skip
    """Return act(x W^T + bias) for x turned."""
    (M, N, K), (kept, bw, bh) = sizes, values.shape
    panels = cdiv(N, bh)
    steps = kept * bw // (panels * tile.k)
    parts = 1 << (min(tile.split, max(steps, 1)).bit_length() - 1)
    turned = batch_last and parts == 1
    y = x.new_empty(N, M) if turned else x.new_empty(M, N)
    out = y if parts == 1 else x.new_empty(parts, M, N, dtype=torch.float32)
    ends = (None, 0) if parts > 1 else (bias, activation)
    with torch.cuda.device_of(x):
        narrow_kernel[(cdiv(M, tile.m) * panels, parts)](
            x, values, *index, ends[0], out, M, K, N, x.shape[1], panels,
            CHUNK=bw, PANEL=bh, HAS_BIAS=ends[0] is not None, ACTIVATION=ends[1],
            PRECISION=precision(x.dtype), PARTS=parts, TURNED=turned,
            BLOCK_M=tile.m, BLOCK_K=tile.k, GROUP_M=_GROUP_M,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if parts > 1:
        finish(out, y, bias, activation)
        return y.t().contiguous().t() if batch_last else y
    return y.t() if turned else y
