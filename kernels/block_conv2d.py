"""block_conv2d in Triton: a convolution of which only blocks of filters x channels are kept.

Implicit GEMM over channels_last: a program makes a tile of outputs (sample, row and column, counted
together) of one panel of bo filters. What it multiplies is the picture as the panel's kept chunks
of channels see it, tap after tap: [outputs, kept * taps * bc], never in memory, times the panel's
values, which are one contiguous matrix [kept * taps * bc, bo]. Chunk after chunk, so that the taps
of a chunk find its pixels in the L2 cache.

A step of BLOCK_K rows of that matrix is a part of one tap of one block, or several of them. Every
copy is 16 bytes wide; pixels of another width are padded in a copy first. Taps that fall into the
padding are read as zeros and multiplied.

Floor on a GPU of P FLOP/s, with L FLOP/s' worth of bytes from its L2 cache: every step of k reads
m pixels and bo filters for m * bo products, whatever the sparsity and once for every tap, so panels
of up to 64 filters are bound by the reads of x and not by the tensor cores. Blocks of 128 filters
read x half as often as blocks of 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import block_linear
from .block_conv2d_checks import Conv, copy_width, guard, pixels_of
from .block_conv2d_steps import find_reach, find_step, load_seen
from .epilogue import activate, finish
from .launch import arch_of, cdiv, conv_precision, parts_of
from .tiles import Tile, pick_tile

GROUP_M = 32  # tiles of outputs that go through all panels together, while x is in the L2 cache
# Sizes that change from call to call: a compilation each would buy nothing.
_PLAIN = ["M", "H", "W", "out_h", "out_w", "panels", "panels_per_group"]
_ANY = ["stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"]


@triton.jit
def find_place(pid, M, panels, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """Return (tile of outputs, place in the order of panels) of a program.

    GROUP_M tiles go through all panels together, first through those with the most work, so that
    little is left when programs run out.
    """
    group = pid // (GROUP_M * panels)
    size = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    rest = pid % (GROUP_M * panels)
    return group * GROUP_M + rest % size, rest // size


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_ANY)
def block_conv2d_kernel(
    x_ptr, values_ptr, offsets_ptr, columns_ptr, order_ptr, bias_ptr, y_ptr,
    M, H, W, C, out_h, out_w, N, panels, panels_per_group, channels,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, CHUNK: tl.constexpr, PANEL: tl.constexpr,
    EVEN_C: tl.constexpr, VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y [PARTS, M, N], M = B out_h out_w: BLOCK_M outputs of a panel, or a part of
    their sums. x [B, H, W, C] and values [kept, KH KW, CHUNK, PANEL] are contiguous."""
    TAPS: tl.constexpr = KH * KW
    MANY: tl.constexpr = BLOCK_K > CHUNK
    tile, place = find_place(tl.program_id(0), M, panels, BLOCK_M, GROUP_M)
    panel = tl.load(order_ptr + place)
    part = tl.program_id(1)

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    sample, pixel = m // (out_h * out_w), m % (out_h * out_w)
    y0 = pixel // out_w * stride_h - padding_h
    x0 = pixel % out_w * stride_w - padding_w
    # int64: a batch of pictures passes 2**31 entries.
    row = ((sample * H + y0) * W + x0).to(tl.int64) * C + panel // panels_per_group * channels
    row = tl.multiple_of(row, VECTOR)
    rows_seen = tl.where(m < M, find_reach(y0, dilation_h, H, KH), 0)
    columns_seen = find_reach(x0, dilation_w, W, KW)

    first = tl.load(offsets_ptr + panel)
    pairs = (tl.load(offsets_ptr + panel + 1) - first) * TAPS
    steps = tl.cdiv(pairs * CHUNK, BLOCK_K)
    begin, end = part * steps // PARTS, (part + 1) * steps // PARTS
    k, n = tl.arange(0, BLOCK_K), tl.arange(0, PANEL)
    matrix = values_ptr + first.to(tl.int64) * (TAPS * CHUNK * PANEL)
    matrix = matrix + k[:, None] * PANEL + n[None, :]

    # A step's columns of blocks are loaded one step ahead: inside the step they would be the
    # address of another load, on which the compiler spends half of its pipeline.
    block, tap, inner, inside = find_step(begin, pairs, TAPS, CHUNK, BLOCK_K)
    column = tl.load(columns_ptr + first + block, mask=inside, other=0)
    acc = tl.zeros((BLOCK_M, PANEL), tl.float32)
    for step in range(begin, end):
        block, tap, inner, inside = find_step(step, pairs, TAPS, CHUNK, BLOCK_K)
        w_mask = inside[:, None] if MANY else None
        w = tl.load(matrix + step * (BLOCK_K * PANEL), mask=w_mask, other=0.0 if MANY else None)
        x = load_seen(
            x_ptr, row, rows_seen, columns_seen, tap // KW, tap % KW, dilation_h, dilation_w,
            column * CHUNK + inner, inside, W, C, channels, EVEN_C, MANY, VECTOR,
        )  # fmt: skip
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        block, tap, inner, inside = find_step(step + 1, pairs, TAPS, CHUNK, BLOCK_K)
        column = tl.load(columns_ptr + first + block, mask=inside, other=0)

    n += panel * PANEL
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    y = y_ptr + (part * tl.cast(M, tl.int64) + m)[:, None] * N + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def launch(
    x: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, schedule: Tensor,
    shape: tuple[int, int, int, int], bias: Tensor | None, stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], groups: int, relu: bool,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Return y = act(conv2d(x, W) + bias) [B, Cout, H', W'], channels last.

    x            [B, C, H, W] float16, bfloat16 or float32; copied where it is not channels last
    values       [kept, kh * kw, bc, bo] contiguous, dtype of x; bo, bc in SIDES
    row_offsets  [rows + 1] int32, rows = ceil(Cout / bo)
    columns      [kept] int32 in [0, width), width = ceil(C / groups / bc)
    schedule     int32 of formats.schedule.make_schedule
    shape        (Cout, C / groups, kh, kw); with groups > 1 bo divides Cout / groups
    bias         [Cout], dtype of x, or None
    relu         whether act is ReLU
    tile         sizes of a program's work (n is bo, whatever it says); None takes pick_tile's, or
                 for 1x1 kernels of stride 1 without padding and groups block_linear's kernel

    Sums in float32; float32 products as in launch.conv_precision, of 1x1 kernels that run
    as a product as in launch.precision. Deterministic; runs on the current
    stream. Raises TypeError and ValueError where an operand does not fit; what the indices hold is
    not looked at.
    """
    conv = Conv.of(x.shape, shape, stride, padding, dilation, groups)
    guard("block_conv2d", conv, x, values, row_offsets, columns, schedule)
    conv.check_bias("block_conv2d", bias, values)
    (kept, taps, bc, bo), (batch, C, H, W) = values.shape, x.shape
    (height, width), N, activation = conv.size, shape[0], int(relu)
    M = batch * height * width
    y = x.new_empty(batch, height, width, N)
    if y.numel() == 0:
        return y.permute(0, 3, 1, 2)
    if conv.is_product() and tile is None:
        args = (values[:, 0], row_offsets, columns, schedule, (N, C), bias, activation)
        y = block_linear.launch(x.permute(0, 2, 3, 1).contiguous().view(M, C), *args)
        return y.view(batch, height, width, N).permute(0, 3, 1, 2)
    least = 1 if tile else block_linear.PART_STEPS  # steps of a part
    if tile is None:
        sizes, density = (M, N, shape[1] * taps), conv.density(kept, (bo, bc))
        tile = pick_tile(f"block_conv2d/{bo}", sizes, density, x.dtype, arch_of(x))
    panels = row_offsets.numel() - 1
    steps = kept * taps * bc // (panels * tile.k)  # of a panel, on average
    parts = parts_of(tile.split, steps // least)
    out = y if parts == 1 else x.new_empty(parts, M, N, dtype=torch.float32)
    ends = (None, 0) if parts > 1 else (bias, activation)
    pixels = pixels_of(x, groups)
    channels = pixels.shape[3] // groups
    with torch.cuda.device_of(x):
        block_conv2d_kernel[(cdiv(M, tile.m) * panels, parts)](
            pixels, values, row_offsets, columns, schedule, ends[0], out,
            M, H, W, pixels.shape[3], height, width, N, panels, panels // groups, channels,
            *stride, *padding, *dilation,
            KH=shape[2], KW=shape[3], CHUNK=bc, PANEL=bo, EVEN_C=channels % bc == 0,
            VECTOR=copy_width(x.dtype), HAS_BIAS=ends[0] is not None, ACTIVATION=ends[1],
            PRECISION=conv_precision(x.dtype), PARTS=parts, BLOCK_M=tile.m, BLOCK_K=tile.k,
            GROUP_M=GROUP_M, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if parts > 1:
        finish(out, y, bias, activation)
    return y.permute(0, 3, 1, 2)
