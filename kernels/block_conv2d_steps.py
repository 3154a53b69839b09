"""What the Triton kernels of block_conv2d share: which taps see what, and walking a list of blocks.

A picture is x [B, H, W, C]. A "pair" is one tap of one block: CHUNK rows of the implicit product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_step(step, pairs, taps, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return (number of the block, its tap, place inside the chunk, whether the pair exists).

    A step is BLOCK_K rows: a part of a pair, or several pairs; then all four are vectors [BLOCK_K].
    """
    if BLOCK_K > CHUNK:
        k = tl.arange(0, BLOCK_K)
        pair = step * (BLOCK_K // CHUNK) + k // CHUNK
        inner = k % CHUNK
    else:
        pair = step // (CHUNK // BLOCK_K)
        inner = step % (CHUNK // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    return pair // taps, pair % taps, inner, pair < pairs


@triton.jit
def find_reach(first, step, size, COUNT: tl.constexpr):
    """Return bits of int32: bit i is set where first + i * step lies in [0, size)."""
    bits = first * 0
    for i in tl.static_range(COUNT):
        at = first + i * step
        bits |= ((at >= 0) & (at < size)).to(tl.int32) << i
    return bits


@triton.jit
def load_seen(
    x_ptr, row, rows_seen, columns_seen, y, x, step_y, step_x, channel, k_inside, W, C, channels,
    EVEN_C: tl.constexpr, MANY: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return [m, k]: what tap (y, x) of each k sees of a picture; zero outside of it.

    row           [m] int64: offset of what tap (0, 0) sees, channel 0
    rows_seen     [m] bits: which y lie inside the picture; columns_seen: which x
    y, x          numbers, or [k] with MANY, as k_inside
    step_y        rows of the picture between taps; step_x: columns
    channel       [k]; where not EVEN_C, those from `channels` on are zero
    """
    at = (y * step_y * W + x * step_x) * C + channel
    at = tl.max_contiguous(tl.multiple_of(at, VECTOR), VECTOR)
    if MANY:
        seen = (rows_seen[:, None] >> y[None, :]) & (columns_seen[:, None] >> x[None, :])
        inside = ((seen & 1) != 0) & k_inside[None, :]
    else:
        inside = ((rows_seen >> y) & (columns_seen >> x) & 1)[:, None] != 0
    if not EVEN_C:
        inside = inside & (channel < channels)[None, :]
    return tl.load(x_ptr + row[:, None] + at[None, :], mask=inside, other=0.0)
