"""Gradient of masked_linear to its weight in Triton: (G^T x) o M, computed only where M keeps.

One program per tile of the weight. It looks at the tile's bits first: where nothing is kept it
stores zeros and ends, so the work is that of the tiles that keep anything. Few tiles and many
tokens: the tokens are cut into parts, which a second kernel adds up in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .epilogue import finish
from .launch import arch_of, cdiv, check_dtype, check_operand, parts_of, precision, tma_reads
from .mask_bits import load_bits, select_kept
from .masked_linear import load_tile
from .tiles import Tile, pick_tile

_OP = "masked_linear_grad_weight"
_GROUP = 8  # rows of tiles that share a panel of x while it is in the L2 cache


@triton.jit(do_not_specialize=["M"])
def masked_grad_kernel(
    grad, x, bits_ptr, out_ptr, M, N, K, words,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile of out [PARTS, N, K] = (grad^T x) o M, over a part of the M tokens."""
    pid = tl.program_id(0)
    part = tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    per_group = GROUP * tl.cdiv(K, BLOCK_K)
    first = pid // per_group * GROUP
    group = tl.minimum(tiles_n - first, GROUP)
    n = (first + pid % per_group % group) * BLOCK_N
    k = pid % per_group // group * BLOCK_K

    bits = load_bits(bits_ptr, n, k // 32, N, words, BLOCK_N, BLOCK_K // 32)
    kept = tl.max(tl.max((bits != 0).to(tl.int32), axis=1), axis=0)
    steps = tl.cdiv(M, BLOCK_M)
    begin = (steps * part // PARTS) * BLOCK_M
    end = (steps * (part + 1) // PARTS) * BLOCK_M
    end = tl.where(kept != 0, end, begin)  # an empty tile takes no step: a branch would cost more
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in range(begin, end, BLOCK_M):
        g_tile = load_tile(grad, m, n, M, N, BLOCK_M, BLOCK_N, not EVEN_M, not EVEN_N, TMA, True)
        x_tile = load_tile(x, m, k, M, K, BLOCK_M, BLOCK_K, not EVEN_M, not EVEN_K, TMA)
        acc = tl.dot(g_tile, x_tile, acc, input_precision=PRECISION)

    acc = select_kept(acc, bits, False)
    rows = n + tl.arange(0, BLOCK_N)
    columns = k + tl.arange(0, BLOCK_K)
    at = part.to(tl.int64) * N * K + rows.to(tl.int64)[:, None] * K + columns[None, :]
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


def launch_grad_weight(
    grad: Tensor, x: Tensor, mask_bits: Tensor, tile: Tile | None = None
) -> Tensor:
    """Return (grad^T x) o M [N, K], zero wherever the mask is.

    grad       [M, N] contiguous, float16, bfloat16 or float32
    x          [M, K] contiguous, dtype of grad
    mask_bits  [N, ceil(K / 32)] contiguous int32; bit k % 32 of word k // 32 set = kept
    tile       m rows and n columns of the weight (n a multiple of 32), k tokens a step; None takes
               pick_tile's
    returns    [N, K], accumulated in float32, cast to x.dtype

    float32 as in launch.precision. Deterministic; runs on the current stream. Raises ValueError
    (shapes, strides, devices), TypeError (dtypes).
    """
    check_dtype(_OP, "x", x)
    (M, K), N = x.shape, grad.shape[-1]
    check_operand(_OP, "x", x, (M, K), grad, grad.dtype)
    check_operand(_OP, "grad", grad, (M, N), x, x.dtype)
    check_operand(_OP, "mask_bits", mask_bits, (N, cdiv(K, 32)), x, torch.int32)
    out = x.new_empty(N, K)
    if out.numel() == 0:
        return out
    if M == 0:
        return out.zero_()
    tile = tile or pick_tile(_OP, (N, K, M), 1.0, x.dtype, arch_of(x))
    parts = parts_of(tile.split, cdiv(M, tile.k))
    sums = out if parts == 1 else x.new_empty(parts, N, K, dtype=torch.float32)
    tma = tile.tma and tma_reads(grad) and tma_reads(x)
    operands = (grad, x)
    if tma:
        boxes = ([tile.k, tile.m], [tile.k, tile.n])
        operands = map(TensorDescriptor.from_tensor, operands, boxes)
    with torch.cuda.device_of(x):
        masked_grad_kernel[(cdiv(N, tile.m) * cdiv(K, tile.n), parts)](
            *operands, mask_bits, sums, M, N, K, mask_bits.shape[1],
            # Descriptors end by themselves, so there nothing depends on it: one compilation less.
            EVEN_M=tma or M % tile.k == 0, EVEN_N=tma or N % tile.m == 0,
            EVEN_K=tma or K % tile.n == 0, PRECISION=precision(x.dtype),
            TMA=tma, PARTS=parts, GROUP=_GROUP, BLOCK_N=tile.m, BLOCK_K=tile.n, BLOCK_M=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if parts > 1:
        finish(sums, out)
    return out
