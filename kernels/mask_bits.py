"""Masks as bits in Triton: packed, sorted by tiles into empty, mixed and full, and applied.

Bit k % 32 of word k // 32 of row n says whether weight[n, k] is kept; bits past K are 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, check_operand

# Words that one step of the listing kernel reads: 32 for each of its threads.
_WORDS_A_STEP = 8192
_WARPS = 8
_PACKED = 256  # words that one program of the packing kernel makes


@triton.jit(do_not_specialize=["count"])
def pack_kernel(mask_ptr, bits_ptr, count, K, words, WORDS: tl.constexpr):
    """bits[i] for WORDS words i < count = N words, of mask [N, K] in bytes."""
    i = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    place = tl.arange(0, 32)
    k = (i % words * 32)[:, None] + place[None, :]
    at = (i // words * K)[:, None] + k
    kept = tl.load(mask_ptr + at, mask=(i < count)[:, None] & (k < K), other=0)
    bits = tl.where(kept != 0, 1 << place[None, :], 0)
    tl.store(bits_ptr + i, tl.sum(bits, axis=1), mask=i < count)  # a sum of different bits


@triton.jit
def load_bits(bits_ptr, row, word, N, words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Return [ROWS, WORDS] of bits [N, words] from (row, word) on; 0, nothing kept, outside."""
    rows = row + tl.arange(0, ROWS)
    columns = word + tl.arange(0, WORDS)
    inside = (rows < N)[:, None] & (columns < words)[None, :]
    at = bits_ptr + rows.to(tl.int64)[:, None] * words + columns[None, :]
    return tl.load(at, mask=inside, other=0)


@triton.jit
def select_kept(weight, bits, PACKED: tl.constexpr):
    """Return weight [R, C] with zeros where bits [R, C / 32] has a 0.

    Bits are taken, not multiplied: a masked NaN is gone, and bfloat16 needs no arithmetic.
    PACKED: two 16-bit weights at a time, in 2 instructions a weight instead of 5.
    """
    signs = bits[:, :, None] << (31 - tl.arange(0, 32))[None, None, :]
    signs = tl.reshape(signs, weight.shape)  # negative where kept
    if PACKED:
        # PRMT 0xffbb spreads the sign of its first operand over the low half of the word and that
        # of the second over the high half, which are the two weights of one register.
        kept = tl.inline_asm_elementwise(
            "{ .reg .b32 kept; prmt.b32 kept, $2, $3, 0xffbb; and.b32 $0, $1, kept; }",
            "=r,r,r,r", [weight, signs], dtype=weight.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    elif weight.dtype.primitive_bitwidth == 16:
        kept = weight.to(tl.int16, bitcast=True) & (signs >> 31).to(tl.int16)
        kept = kept.to(weight.dtype, bitcast=True)
    else:
        kept = (weight.to(tl.int32, bitcast=True) & (signs >> 31)).to(weight.dtype, bitcast=True)
    return kept


@triton.jit(do_not_specialize=["N", "steps"])
def list_tiles_kernel(
    bits_ptr, lists_ptr, counts_ptr, N, K, words, steps,
    TURNED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """List, for one panel of tiles, those where all is kept and those where a part is.

    Tiles are ROWS x 32 WORDS. A panel is a row of them, or, TURNED, a column; TOGETHER are looked
    at in one go. lists[panel, 0, :counts[panel, 0]] get the numbers of full tiles within the panel,
    ascending, and lists[panel, 1, :counts[panel, 1]] those of mixed ones.
    """
    HIGH: tl.constexpr = ROWS * TOGETHER if TURNED else ROWS
    WIDE: tl.constexpr = WORDS if TURNED else WORDS * TOGETHER
    panel = tl.program_id(0)
    list_ptr = lists_ptr + panel.to(tl.int64) * 2 * (steps + 1)
    all_count = 0
    some_count = 0
    for first in range(0, steps, TOGETHER):
        row = (first if TURNED else panel) * ROWS
        word = (panel if TURNED else first) * WORDS
        bits = load_bits(bits_ptr, row, word, N, words, HIGH, WIDE)
        # What lies outside the weight takes no part in it.
        rows = row + tl.arange(0, HIGH)
        left = K - 32 * (word + tl.arange(0, WIDE))  # columns from this word on
        tail = tl.where(left < 32, -1 << tl.minimum(tl.maximum(left, 0), 31), 0)
        tail = tl.where(left <= 0, -1, tail)
        filled = tl.where((rows < N)[:, None], bits | tail[None, :], -1)
        some = (bits != 0).to(tl.int32)
        lacks = (filled != -1).to(tl.int32)
        if TURNED:
            some = tl.reshape(tl.max(some, axis=1), (TOGETHER, ROWS))
            lacks = tl.reshape(tl.max(lacks, axis=1), (TOGETHER, ROWS))
        else:
            some = tl.reshape(tl.max(some, axis=0), (TOGETHER, WORDS))
            lacks = tl.reshape(tl.max(lacks, axis=0), (TOGETHER, WORDS))
        some = tl.max(some, axis=1)
        full = some * (1 - tl.max(lacks, axis=1))
        mixed = some - full
        tile = first + tl.arange(0, TOGETHER)
        place = all_count + tl.cumsum(full, axis=0) - full
        tl.store(list_ptr + place, tile, mask=full != 0)
        place = some_count + tl.cumsum(mixed, axis=0) - mixed
        tl.store(list_ptr + steps + 1 + place, tile, mask=mixed != 0)
        all_count += tl.sum(full, axis=0)
        some_count += tl.sum(mixed, axis=0)
    tl.store(counts_ptr + 2 * panel, all_count)
    tl.store(counts_ptr + 2 * panel + 1, some_count)


def pack(mask: Tensor) -> Tensor:
    """Return the bits [N, ceil(K / 32)] int32 of mask [N, K] bool contiguous, bits past K 0.

    Raises ValueError (shape, strides) and TypeError (dtype).
    """
    check_operand("pack_mask_bits", "mask", mask, (len(mask), mask.shape[-1]), mask, torch.bool)
    (N, K), words = mask.shape, cdiv(mask.shape[1], 32)
    bits = mask.new_empty(N, words, dtype=torch.int32)
    if bits.numel():
        with torch.cuda.device_of(mask):
            pack_kernel[(cdiv(bits.numel(), _PACKED),)](
                mask.view(torch.int8), bits, bits.numel(), K, words, WORDS=_PACKED, num_warps=4
            )
    return bits


# The interpreter knows no inline assembly.
INTERPRETED = not isinstance(list_tiles_kernel, triton.JITFunction)


def tiles_together(rows: int, words: int) -> int:
    """Return how many tiles of rows x words words the listing kernel looks at in one go."""
    return max(1, _WORDS_A_STEP // (rows * words))


def list_tiles(
    mask_bits: Tensor, K: int, rows: int, columns: int, turned: bool
) -> tuple[Tensor, Tensor]:
    """Sort the tiles (rows x columns) of a mask into full, mixed and empty ones.

    mask_bits  [N, ceil(K / 32)] int32 contiguous
    turned     panels are columns of tiles, not rows of them
    returns    lists [panels, 2, steps + 1] int32, the numbers of the full and of the mixed tiles of
               each panel, ascending (one entry more, so that a reader may look ahead), and
               counts [panels, 2] int32, how many there are
    """
    N, words = mask_bits.shape
    across, down = cdiv(K, columns), cdiv(N, rows)
    panels, steps = (across, down) if turned else (down, across)
    lists = mask_bits.new_empty(panels, 2, steps + 1)
    counts = mask_bits.new_empty(panels, 2)
    with torch.cuda.device_of(mask_bits):
        list_tiles_kernel[(panels,)](
            bits_ptr=mask_bits, lists_ptr=lists, counts_ptr=counts, N=N, K=K, words=words,
            steps=steps, TURNED=turned, ROWS=rows, WORDS=columns // 32,
            TOGETHER=tiles_together(rows, columns // 32), num_warps=_WARPS,
        )  # fmt: skip
    return lists, counts
