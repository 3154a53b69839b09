"""The gradient of block_linear to its values: a dense product, taken in the kept blocks alone.

grad W = G^T x. What a row of blocks keeps of it is one matrix: the columns of x that the row keeps
by the columns of G that are the row's. A program sums a tile of that matrix over the samples.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .block_linear import PART_STEPS, SIDES
from .epilogue import finish
from .launch import align_rows, arch_of, cdiv, check_dtype, check_operand, precision, tma_reads
from .tiles import Tile, pick_tile

_OP = "block_linear_grad_values"
_SEARCH = 256  # rows of blocks looked at together


@triton.jit
def find_tile(
    offsets_ptr, rows, tile, BW: tl.constexpr, BLOCK_J: tl.constexpr, SEARCH: tl.constexpr
):
    """Return the row of blocks that a tile belongs to, and the tile's number inside of it.

    Row r, whose values are rows offsets[r] BW .. offsets[r + 1] BW of a matrix, owns the tiles from
    offsets[r] BW // BLOCK_J + r on: at least as many as cover it, without a count of all rows
    before it; what is left over of them is empty.
    """
    row = 0
    begin = 0
    for start in range(0, rows, SEARCH):
        r = start + tl.arange(0, SEARCH)
        offset = tl.load(offsets_ptr + r, mask=r < rows, other=0)
        base = (offset.to(tl.int64) * BW // BLOCK_J).to(tl.int32) + r
        mine = (base <= tile) & (r < rows)
        row += tl.sum(mine.to(tl.int32), axis=0)
        begin = tl.maximum(begin, tl.max(tl.where(mine, base, 0), axis=0))
    return row - 1, tile - begin


@triton.jit(do_not_specialize=["M", "rows"])
def sampled_kernel(
    grad, x, offsets_ptr, columns_ptr, out_ptr,
    M, N, K, rows, size,
    BH: tl.constexpr, BW: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr, SEARCH: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile of out [PARTS, kept * BW, BH] = x^T grad, size entries a part: BLOCK_J rows.

    x [M, K] and grad [M, N] are contiguous, or, with TMA, descriptors of them.
    """
    row, number = find_tile(offsets_ptr, rows, tl.program_id(0), BW, BLOCK_J, SEARCH)
    first = tl.load(offsets_ptr + row)
    length = tl.load(offsets_ptr + row + 1) - first
    if number * BLOCK_J >= length * BW:
        return
    j = number * BLOCK_J + tl.arange(0, BLOCK_J)
    place = j // BW
    if BLOCK_J <= BW:
        place = number * BLOCK_J // BW
    chunk = tl.load(columns_ptr + first + place, mask=place < length, other=0)
    WIDTH: tl.constexpr = BLOCK_J if BLOCK_J < BW else BW
    at = tl.max_contiguous(tl.multiple_of(chunk * BW + j % BW, WIDTH), WIDTH)
    i = tl.arange(0, BH)
    x_mask = (j < length * BW)[:, None]
    if not EVEN_K:
        x_mask = x_mask & (at < K)[:, None]
    n_mask = (row * BH + i < N)[None, :]

    part = tl.program_id(1)
    steps = tl.cdiv(M, BLOCK_M)
    acc = tl.zeros((BLOCK_J, BH), tl.float32)
    for step in range(steps * part // PARTS, steps * (part + 1) // PARTS):
        if TMA:
            x_tile = tl.trans(x.load([step * BLOCK_M, chunk * BW + number * BLOCK_J % BW]))
            g_tile = grad.load([step * BLOCK_M, row * BH])
        else:
            m = step * BLOCK_M + tl.arange(0, BLOCK_M)
            here = m < M
            m = m.to(tl.int64)
            x_tile = x + at[:, None] + m[None, :] * K
            x_tile = tl.load(x_tile, mask=here[None, :] & x_mask, other=0.0)
            g_mask = here[:, None] if EVEN_N else here[:, None] & n_mask
            g_tile = grad + m[:, None] * N + (row * BH + i)[None, :]
            g_tile = tl.load(g_tile, mask=g_mask, other=0.0)
        acc = tl.dot(x_tile, g_tile, acc, input_precision=PRECISION)
    to = (first.to(tl.int64) * BW + j)[:, None] * BH + i[None, :]
    out = out_ptr + part * tl.cast(size, tl.int64) + to
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(j < length * BW)[:, None])


def launch_grad_values(
    grad: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, block: tuple[int, int],
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient to the values of blocks (bh, bw): grad^T x in the kept blocks.

    grad         [M, N] contiguous, float16, bfloat16 or float32
    x            [M, K] contiguous, dtype of grad
    row_offsets  [ceil(N / bh) + 1] int32
    columns      [kept] int32 in [0, ceil(K / bw))
    block        (bh, bw), each in SIDES
    tile         m rows of a row's values (its kept columns of W), k samples a step
    returns      [kept, bw, bh], accumulated in float32; zero in the padding

    Deterministic; runs on the current stream. Raises TypeError and ValueError where an operand does
    not fit; what the indices hold is not looked at. Where N or K is no multiple of 16, a padded
    copy of grad or x is read.
    """
    rows = _check(grad, x, row_offsets, columns, block)
    (bh, bw), kept = block, columns.numel()
    grad, x = align_rows(grad, bh), align_rows(x, bw)
    (M, N), K = grad.shape, x.shape[1]
    values = grad.new_empty(kept, bw, bh)
    if kept == 0:
        return values
    if M == 0:
        return values.zero_()
    if tile is None:
        density, op = kept / max(rows * cdiv(K, bw), 1), f"{_OP}/{bh}"
        tile = pick_tile(op, (N, K, M), density, grad.dtype, arch_of(grad))
        most = max(M // (tile.k * PART_STEPS), 1)
        tile = dataclasses.replace(tile, split=min(tile.split, most))
    # Samples are cut into no more parts than they have steps; a power of two, as every number is a
    # compilation.
    parts = 1 << (min(tile.split, cdiv(M, tile.k)).bit_length() - 1)
    out = values
    if parts > 1:
        out = values.new_empty(parts, kept, bw, bh, dtype=torch.float32)
    tma = tile.tma and tile.m <= bw and tma_reads(x) and tma_reads(grad)
    operands = (grad, x)
    if tma:
        boxes = ([tile.k, bh], [tile.k, tile.m])
        operands = [TensorDescriptor.from_tensor(*p) for p in zip(operands, boxes, strict=True)]
    with torch.cuda.device_of(grad):
        sampled_kernel[(kept * bw // tile.m + rows, parts)](
            *operands, row_offsets, columns, out, M, N, K, rows, values.numel(),
            BH=bh, BW=bw, EVEN_N=N % bh == 0, EVEN_K=K % bw == 0, PRECISION=precision(grad.dtype),
            PARTS=parts, TMA=tma, SEARCH=_SEARCH, BLOCK_J=tile.m, BLOCK_M=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if parts > 1:
        finish(out, values)
    return values


def _check(
    grad: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, block: tuple[int, int]
) -> int:
    """Return the rows of blocks; raise unless the operands fit each other."""
    (M, N), K = grad.shape, x.shape[1]
    check_dtype(_OP, "grad", grad)
    if not set(block) <= set(SIDES):
        raise ValueError(f"{_OP}: expected sides in {SIDES}, got block {tuple(block)}")
    rows = cdiv(N, block[0])
    check_operand(_OP, "grad", grad, (M, N), grad, grad.dtype)
    check_operand(_OP, "x", x, (M, K), grad, grad.dtype)
    check_operand(_OP, "row_offsets", row_offsets, (rows + 1,), grad, torch.int32)
    check_operand(_OP, "columns", columns, tuple(columns.shape[:1]), grad, torch.int32)
    return rows
