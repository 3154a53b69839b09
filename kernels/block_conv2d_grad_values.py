"""Gradient of block_conv2d to its kept values, in Triton.

For a kept block, what its taps see of its chunk of channels, turned, times the gradient of its
panel: [taps * bc, outputs] times [outputs, bo]. A program makes BLOCK_N rows of that for one block
and walks all outputs, or a part of them; parts are added up afterwards, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import block_linear, block_linear_grad
from .block_conv2d_checks import Conv, copy_width, guard, pixels_of
from .epilogue import finish
from .launch import arch_of, cdiv, conv_precision, parts_of
from .tiles import Tile, pick_tile

_OP = "block_conv2d_grad_values"
_ENOUGH = 1024  # programs: several for every multiprocessor
_PLAIN = ["blocks_ptr", "rows_ptr", "M", "H", "W", "out_h", "out_w", "panels_per_group"]
_PLAIN += ["magic_pixels", "shift_pixels", "magic_w", "shift_w"]
_ANY = ["stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"]


@triton.jit
def divide(n, magic, shift):
    """Return n // d for n in [0, 2**31) and (magic, shift) = find_magic(d)."""
    n = n.to(tl.uint32)
    return ((tl.umulhi(n, tl.cast(magic, tl.uint32)) + n) >> shift).to(tl.int32)


def find_magic(d: int) -> tuple[int, int]:
    """Return two numbers in int32 by which `divide` divides by d in [1, 2**31).

    n // d = ((n * magic >> 32) + n) >> shift, as in Granlund and Montgomery, Division by invariant
    integers using multiplication.
    """
    shift = (d - 1).bit_length()
    magic = ((1 << 32) * ((1 << shift) - d)) // d + 1
    return (magic - (1 << 32) if magic >= 1 << 31 else magic), shift


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_ANY)
def block_conv2d_grad_values_kernel(
    x_ptr, grad_ptr, columns_ptr, blocks_ptr, rows_ptr, out_ptr,
    kept, M, H, W, C, out_h, out_w, N, panels_per_group, channels,
    magic_pixels, shift_pixels, magic_w, shift_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, CHUNK: tl.constexpr, PANEL: tl.constexpr,
    EVEN_C: tl.constexpr, EVEN_N: tl.constexpr, VECTOR: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of one block of out [PARTS, kept, KH KW CHUNK, PANEL]: BLOCK_M of them, from all M
    outputs or a part of them, BLOCK_K a step. x [B, H, W, C], grad [M, N] are contiguous."""
    ROWS: tl.constexpr = KH * KW * CHUNK
    TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    entry, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    part = tl.program_id(1)
    block, panel = tl.load(blocks_ptr + entry), tl.load(rows_ptr + entry)

    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tap, inner = r // CHUNK, r % CHUNK
    down, along = tap // KW * dilation_h, tap % KW * dilation_w
    channel = tl.load(columns_ptr + block) * CHUNK + inner
    at = (down * W + along) * C + panel // panels_per_group * channels + channel
    at = tl.max_contiguous(tl.multiple_of(at, VECTOR), VECTOR)
    exists = r < ROWS
    if not EVEN_C:
        exists = exists & (channel < channels)
    n = panel * PANEL + tl.arange(0, PANEL)
    high, wide = tl.cast(H, tl.uint32), tl.cast(W, tl.uint32)

    steps = tl.cdiv(M, BLOCK_K)
    begin, end = part * steps // PARTS, (part + 1) * steps // PARTS
    acc = tl.zeros((BLOCK_M, PANEL), tl.float32)
    for step in range(begin, end):
        m = step * BLOCK_K + tl.arange(0, BLOCK_K)
        sample = divide(m, magic_pixels, shift_pixels)
        pixel = m - sample * (out_h * out_w)
        line = divide(pixel, magic_w, shift_w)
        y0 = line * stride_h - padding_h
        x0 = (pixel - line * out_w) * stride_w - padding_w
        row = tl.multiple_of(((sample * H + y0) * W + x0).to(tl.int64) * C, VECTOR)
        y, x = down[:, None] + y0[None, :], along[:, None] + x0[None, :]
        inside = (y.to(tl.uint32) < high) & (x.to(tl.uint32) < wide)  # negative: very large
        inside = inside & (m < M)[None, :] & exists[:, None]
        seen = tl.load(x_ptr + at[:, None] + row[None, :], mask=inside, other=0.0)
        g_mask = (m < M)[:, None]
        if not EVEN_N:
            g_mask = g_mask & (n < N)[None, :]
        g_row = tl.multiple_of(m.to(tl.int64) * N, VECTOR)
        g = tl.load(grad_ptr + g_row[:, None] + n[None, :], mask=g_mask, other=0.0)
        acc = tl.dot(seen, g, acc, input_precision=PRECISION)

    out = out_ptr + (part * tl.cast(kept, tl.int64) + block) * (ROWS * PANEL)
    out = out + r[:, None] * PANEL + tl.arange(0, PANEL)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(r < ROWS)[:, None])


def launch(
    grad: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, schedule: Tensor,
    shape: tuple[int, int, int, int], block: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], groups: int, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient to values [kept, kh * kw, bc, bo], zero in the padding of blocks.

    grad   [B, Cout, H', W']; x [B, C, H, W], same dtype; block = (bo, bc)
    tile   m counts rows of a block (taps times channels), k outputs of a step; n is bo, whatever it
           says; split is the most parts that the outputs are cut into
    The other arguments are those of block_conv2d.launch. Sums in float32. Deterministic; runs on
    the current stream. Raises TypeError and ValueError as it does.
    """
    conv = Conv.of(x.shape, shape, stride, padding, dilation, groups)
    kept, (bo, bc) = columns.numel(), block
    out = x.new_empty(kept, conv.taps, bc, bo)
    guard(_OP, conv, x, out, row_offsets, columns, schedule)
    (batch, C, H, W), (height, width), N = x.shape, conv.size, shape[0]
    if grad.shape != (batch, N, height, width):
        raise ValueError(f"{_OP}: got grad {tuple(grad.shape)} for outputs of {conv}")
    if grad.dtype != x.dtype or grad.device != x.device:
        raise TypeError(
            f"{_OP}: expected grad {x.dtype} on {x.device}, got {grad.dtype} on {grad.device}"
        )
    M = batch * height * width
    if out.numel() == 0 or M == 0:
        return out.zero_()
    if conv.is_product() and tile is None:
        args = [t.permute(0, 2, 3, 1).contiguous().view(M, t.shape[1]) for t in (grad, x)]
        out = block_linear_grad.launch_grad_values(*args, row_offsets, columns, block)
        return out[:, None]
    rows, chunks = conv.grid(block)
    least = 1 if tile else block_linear.PART_STEPS  # steps of a part
    if tile is None:
        sizes, density = (M, N, shape[1] * conv.taps), conv.density(kept, block)
        tile = pick_tile(f"{_OP}/{bo}", sizes, density, x.dtype, arch_of(x))
    block_m = min(tile.m, 1 << (conv.taps * bc - 1).bit_length())
    programs = kept * cdiv(conv.taps * bc, block_m)
    fewest = cdiv(_ENOUGH, programs)
    parts = parts_of(min(tile.split, fewest), M // (least * tile.k))
    work = out if parts == 1 else x.new_empty(parts, *out.shape, dtype=torch.float32)
    blocks, rows_of = schedule.split([rows + 2 * chunks + 1, kept, kept])[1:]
    pixels, grad = pixels_of(x, groups), pixels_of(grad)
    C, N, wide = pixels.shape[3], grad.shape[3], copy_width(x.dtype)
    with torch.cuda.device_of(x):
        block_conv2d_grad_values_kernel[(programs, parts)](
            pixels, grad, columns, blocks, rows_of, work,
            kept, M, H, W, C, height, width, N, rows // groups, C // groups,
            *find_magic(height * width), *find_magic(width), *stride, *padding, *dilation,
            KH=shape[2], KW=shape[3], CHUNK=bc, PANEL=bo, EVEN_C=C // groups % bc == 0,
            EVEN_N=N % bo == 0, VECTOR=wide,
            PRECISION=conv_precision(x.dtype), PARTS=parts, BLOCK_M=block_m, BLOCK_K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if parts > 1:
        finish(work, out)
    return out
