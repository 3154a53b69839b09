"""Gradient of block_conv2d to its input, in Triton.

Implicit GEMM again, through the turned list: a program makes a tile of pixels of one chunk of bc
channels from what the kept blocks above that chunk read it with. With strides, pixels whose rows
and columns leave the same remainders (a class) are reached by the same taps, every few of them; a
program's pixels are of one class, so that no tap is multiplied for nothing.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import block_linear
from .block_conv2d import GROUP_M, find_place
from .block_conv2d_checks import Conv, copy_width, guard, pixels_of
from .block_conv2d_steps import find_reach, find_step, load_seen
from .epilogue import finish
from .launch import arch_of, cdiv, conv_precision, parts_of
from .tiles import Tile, pick_tile

_OP = "block_conv2d_grad_x"
_PLAIN = [
    "offsets_ptr",
    "blocks_ptr",
    "rows_ptr",
    "order_ptr",
    "B",
    "H",
    "W",
    "out_h",
    "out_w",
    "columns",
    "panels_per_group",
]
_ANY = ["stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"]
_ANY += ["every_h", "every_w"]


@triton.jit
def find_taps(remainder, stride, padding, dilation, every, COUNT: tl.constexpr):
    """Return (first tap that reaches pixels of this remainder, how many do, first output).

    Tap t reaches pixel p from output (p + padding - t * dilation) / stride, where that is whole:
    for every every-th tap. The first output is that of the first tap for the pixel `remainder`.
    """
    first = COUNT
    for t in tl.static_range(COUNT):
        tap = COUNT - 1 - t
        first = tl.where((remainder + padding - tap * dilation) % stride == 0, tap, first)
    count = (COUNT - first + every - 1) // every
    return first, count, (remainder + padding - first * dilation) // stride


@triton.jit
def find_row(rows_ptr, first, last, row):
    """Return the first place in [first, last) whose row is not below `row`; rows increase."""
    while first < last:
        middle = (first + last) // 2
        below = tl.load(rows_ptr + middle) < row
        first = tl.where(below, middle + 1, first)
        last = tl.where(below, last, middle)
    return first


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_ANY)
def block_conv2d_grad_x_kernel(
    grad_ptr, values_ptr, offsets_ptr, blocks_ptr, rows_ptr, order_ptr, out_ptr,
    B, H, W, C, out_h, out_w, N, columns, panels_per_group, channels,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, every_h, every_w,
    KH: tl.constexpr, KW: tl.constexpr, CHUNK: tl.constexpr, PANEL: tl.constexpr,
    GROUPS: tl.constexpr, STRIDED: tl.constexpr, EVEN_N: tl.constexpr, VECTOR: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of out [PARTS, B, H, W, C]: BLOCK_M pixels of a class, PANEL channels.

    grad [B, out_h, out_w, N] and values [kept, KH KW, PANEL, CHUNK] are contiguous.
    """
    MANY: tl.constexpr = BLOCK_K > CHUNK
    high, wide = tl.cdiv(H, stride_h), tl.cdiv(W, stride_w)  # pixels of a class
    M = B * high * wide
    tile, place = find_place(tl.program_id(0), M, columns * GROUPS, BLOCK_M, GROUP_M)
    panel, group = tl.load(order_ptr + place // GROUPS), place % GROUPS
    part = tl.program_id(1)

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    sample, pixel = m // (high * wide), m % (high * wide)
    y, x = pixel // wide, pixel % wide
    if STRIDED:
        rest_y, rest_x = tl.program_id(2) // stride_w, tl.program_id(2) % stride_w
        tap_y, count_y, y0 = find_taps(rest_y, stride_h, padding_h, dilation_h, every_h, KH)
        tap_x, count_x, x0 = find_taps(rest_x, stride_w, padding_w, dilation_w, every_w, KW)
        back_h, back_w = every_h * dilation_h // stride_h, every_w * dilation_w // stride_w
        y0, x0 = y + y0, x + x0
        y, x = y * stride_h + rest_y, x * stride_w + rest_x
        unseen = (count_y == 0) | (count_x == 0)  # no tap reaches this class
        count_x = tl.maximum(count_x, 1)
        taps = tl.maximum(count_y, 1) * count_x
    else:
        tap_y, tap_x, back_h, back_w = 0, 0, dilation_h, dilation_w
        y0, x0 = y + padding_h, x + padding_w
        taps: tl.constexpr = KH * KW
        count_x: tl.constexpr = KW
    row = tl.multiple_of(((sample * out_h + y0) * out_w + x0).to(tl.int64) * N, VECTOR)
    rows_seen = tl.where(m < M, find_reach(y0, -back_h, out_h, KH), 0)
    columns_seen = find_reach(x0, -back_w, out_w, KW)

    first = tl.load(offsets_ptr + panel)
    last = tl.load(offsets_ptr + panel + 1)
    if GROUPS > 1:
        top = group * panels_per_group
        after = find_row(rows_ptr, first, last, top + panels_per_group)
        first = find_row(rows_ptr, first, last, top)
        last = after
    if STRIDED:
        last = tl.where(unseen, first, last)
    pairs = (last - first) * taps
    steps = tl.cdiv(pairs * CHUNK, BLOCK_K)
    begin, end = part * steps // PARTS, (part + 1) * steps // PARTS
    n = tl.arange(0, PANEL)

    # As in the forward pass, what a step reads is known one step ahead.
    entry, tap, inner, inside = find_step(begin, pairs, taps, CHUNK, BLOCK_K)
    block = tl.load(blocks_ptr + first + entry, mask=inside, other=0)
    above = tl.load(rows_ptr + first + entry, mask=inside, other=0)
    acc = tl.zeros((BLOCK_M, PANEL), tl.float32)
    for step in range(begin, end):
        entry, tap, inner, inside = find_step(step, pairs, taps, CHUNK, BLOCK_K)
        ty, tx = tap // count_x, tap % count_x
        whole = (tap_y + ty * every_h) * KW + tap_x + tx * every_w
        at = (block.to(tl.int64) * (KH * KW) + whole) * (PANEL * CHUNK) + inner
        at = tl.max_contiguous(tl.multiple_of(at, 16), 16)
        w_mask = inside[:, None] if MANY else None
        w = values_ptr + at[:, None] + n[None, :] * CHUNK
        w = tl.load(w, mask=w_mask, other=0.0 if MANY else None)
        g = load_seen(
            grad_ptr, row, rows_seen, columns_seen, ty, tx, -back_h, -back_w,
            above * CHUNK + inner, inside, out_w, N, N, EVEN_N, MANY, VECTOR,
        )  # fmt: skip
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
        entry, tap, inner, inside = find_step(step + 1, pairs, taps, CHUNK, BLOCK_K)
        block = tl.load(blocks_ptr + first + entry, mask=inside, other=0)
        above = tl.load(rows_ptr + first + entry, mask=inside, other=0)

    channel = panel * PANEL + n
    here = ((part * tl.cast(B, tl.int64) + sample) * H + y) * W + x
    out = out_ptr + here[:, None] * C + group * channels + channel[None, :]
    mask = ((m < M) & (y < H) & (x < W))[:, None] & (channel < channels)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch(
    grad: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, schedule: Tensor,
    shape: tuple[int, int, int, int], x_shape: tuple[int, int, int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], groups: int, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient to x [B, C, H, W], channels last, for grad [B, Cout, H', W'].

    The other arguments are those of block_conv2d.launch; tile's m counts pixels. Sums in float32.
    Deterministic; runs on the current stream. Raises TypeError and ValueError as it does.
    """
    conv = Conv.of(x_shape, shape, stride, padding, dilation, groups)
    guard(_OP, conv, grad, values, row_offsets, columns, schedule)
    (batch, C, H, W), (height, width), (kept, taps, bc, bo) = x_shape, conv.size, values.shape
    N = shape[0]
    if grad.shape != (batch, N, height, width):
        raise ValueError(f"{_OP}: got grad {tuple(grad.shape)} for outputs of {conv}")
    out = grad.new_empty(batch, H, W, C)
    if out.numel() == 0:
        return out.permute(0, 3, 1, 2)
    if conv.is_product() and tile is None:
        index = (row_offsets, columns, schedule)
        pixels = grad.permute(0, 2, 3, 1).contiguous().view(-1, N)
        args = (pixels, values[:, 0], *index, (N, C))
        return block_linear.launch_grad_x(*args).view(batch, H, W, C).permute(0, 3, 1, 2)
    rows, chunks = conv.grid((bo, bc))
    least = 1 if tile else block_linear.PART_STEPS  # steps of a part
    if tile is None:
        sizes, density = (batch * H * W, C, N // groups * taps), conv.density(kept, (bo, bc))
        tile = pick_tile(f"block_conv2d/{bc}", sizes, density, grad.dtype, arch_of(grad))
    _, order, offsets, blocks, rows_of = schedule.split([rows, chunks, chunks + 1, kept, kept])
    classes = stride[0] * stride[1]
    every = [stride[d] // math.gcd(stride[d], dilation[d]) for d in (0, 1)]
    places = batch * cdiv(H, stride[0]) * cdiv(W, stride[1])
    steps = kept * taps * bo // (chunks * groups * classes * tile.k)
    parts = parts_of(tile.split, steps // least)
    work = out if parts == 1 else grad.new_empty(parts, *out.shape, dtype=torch.float32)
    pixels = pixels_of(grad)
    width_n = pixels.shape[3]
    with torch.cuda.device_of(grad):
        block_conv2d_grad_x_kernel[
            (cdiv(places, tile.m) * chunks * groups, parts, classes)
        ](
            pixels, values, offsets, blocks, rows_of, order, work,
            batch, H, W, C, height, width, width_n, chunks, rows // groups, shape[1],
            *stride, *padding, *dilation, *every,
            KH=shape[2], KW=shape[3], CHUNK=bo, PANEL=bc, GROUPS=groups, STRIDED=classes > 1,
            EVEN_N=width_n % bo == 0, VECTOR=copy_width(grad.dtype),
            PRECISION=conv_precision(grad.dtype), PARTS=parts, BLOCK_M=tile.m, BLOCK_K=tile.k,
            GROUP_M=GROUP_M,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if parts > 1:
        finish(work, out)
    return out.permute(0, 3, 1, 2)
