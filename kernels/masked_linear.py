"""masked_linear in Triton: y = x (W o M)^T + b with the mask M as bits, applied on the way in.

Two kernels. The first lists, per panel of output features, the blocks of K in which the mask keeps
anything; the second walks that list, so blocks that are wholly masked out are neither read nor
multiplied, and the loads stay pipelined (a branch inside the loop would end that).

Floor on an H200: the longer of 2 M N K / 790 TFLOP/s for bfloat16 (its measured dense rate) and the
bytes of x, W, the mask and y / 4.3 TB/s. Unpacking the mask comes on top: see tiles.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Tile, pick_tile

_LIST_STEP = 64  # blocks that the listing kernel looks at per step
_GROUP_M = 8  # tiles of M that share a panel of W while it is in the L2 cache


@triton.jit
def list_blocks_kernel(
    mask_bits_ptr,
    N,
    words,
    k_blocks,
    blocks_ptr,
    counts_ptr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
):
    """blocks[panel, :counts[panel]] = ascending numbers of the K blocks with any kept weight."""
    panel = tl.program_id(0)
    n = panel * BLOCK_N + tl.arange(0, BLOCK_N)
    row = mask_bits_ptr + n.to(tl.int64)[:, None] * words
    column = tl.arange(0, STEP * WORDS)
    count = 0
    for start in range(0, k_blocks, STEP):
        word = start * WORDS + column
        inside = (n < N)[:, None] & (word < words)[None, :]
        bits = tl.load(row + word[None, :], mask=inside, other=0)
        kept = tl.max((bits != 0).to(tl.int32), axis=0)
        kept = tl.max(tl.reshape(kept, (STEP, WORDS)), axis=1)
        place = count + tl.cumsum(kept, axis=0) - kept
        block = start + tl.arange(0, STEP)
        tl.store(blocks_ptr + panel.to(tl.int64) * k_blocks + place, block, mask=kept != 0)
        count += tl.sum(kept, axis=0)
    tl.store(counts_ptr + panel, count)


@triton.jit
def masked_linear_kernel(
    x_ptr,
    weight_ptr,
    mask_bits_ptr,
    bias_ptr,
    blocks_ptr,
    counts_ptr,
    y_ptr,
    M,
    N,
    K,
    words,
    k_blocks,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of y; x [M, K], weight [N, K] and y [M, N] are contiguous."""
    WORDS: tl.constexpr = BLOCK_K // 32

    # Programs that follow each other share a panel of W.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = pid // per_group * GROUP_M
    group = tl.minimum(tiles_m - first, GROUP_M)
    pid_m = first + pid % per_group % group
    pid_n = pid % per_group // group

    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    word_of = tl.arange(0, WORDS)
    # int64: row * K passes 2**31 for large layers.
    x_row = x_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
    weight_row = weight_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    bits_row = mask_bits_ptr + n.to(tl.int64)[:, None] * words + word_of[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(tl.load(counts_ptr + pid_n)):
        block = tl.load(blocks_ptr + pid_n.to(tl.int64) * k_blocks + i)
        start = block * BLOCK_K
        m_mask = (m < M)[:, None]
        n_mask = (n < N)[:, None]
        bits_mask = n_mask
        if not EVEN_K:
            m_mask = m_mask & (start + k < K)[None, :]
            n_mask = n_mask & (start + k < K)[None, :]
            bits_mask = bits_mask & (block * WORDS + word_of < words)[None, :]
        x = tl.load(x_row + start, mask=m_mask, other=0.0)
        weight = tl.load(weight_row + start, mask=n_mask, other=0.0)
        bits = tl.load(bits_row + block * WORDS, mask=bits_mask, other=0)  # [n, words]

        # Selecting, not multiplying: a masked NaN is gone, and bfloat16 needs no arithmetic.
        keep = (bits[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        weight = tl.where(tl.reshape(keep, (BLOCK_N, BLOCK_K)) != 0, weight, 0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)

    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def arch_of(x: Tensor) -> int:
    """Return the compute capability of x's device, 80 for 8.0."""
    if not x.is_cuda:  # Triton's interpreter
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _guard(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None) -> None:
    """Raise unless every address that the kernels form lies inside its tensor."""
    (M, K), N = x.shape, weight.shape[0]
    wanted = [(x, (M, K)), (weight, (N, K)), (mask_bits, (N, triton.cdiv(K, 32)))]
    wanted += [] if bias is None else [(bias, (N,))]
    for tensor, shape in wanted:
        if tensor.shape != shape or not tensor.is_contiguous() or tensor.device != x.device:
            raise ValueError(
                f"masked_linear: expected contiguous {shape} on {x.device}, got "
                f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            )
    if x.dtype != weight.dtype or mask_bits.dtype != torch.int32:
        raise TypeError(f"masked_linear: got {x.dtype}, {weight.dtype}, {mask_bits.dtype}")


def launch(
    x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """Return y = x (W o M)^T + b.

    x          [M, K] contiguous, float16, bfloat16 or float32
    weight     [N, K] contiguous, dtype of x
    mask_bits  [N, ceil(K / 32)] contiguous int32; bit k % 32 of word k // 32 set = kept
    bias       [N], dtype of x, or None
    tile       block sizes; None takes pick_tile's
    returns    [M, N], accumulated in float32, cast to x.dtype

    float32 products take three TF32 products (about float32's accuracy), or one where
    torch.get_float32_matmul_precision() is not "highest". Runs on the current stream.
    """
    _guard(x, weight, mask_bits, bias)
    M, K = x.shape
    N = weight.shape[0]
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    tile = tile or pick_tile("masked_linear", (M, N, K), 1.0, x.dtype, arch_of(x))
    words = mask_bits.shape[1]
    panels, k_blocks = triton.cdiv(N, tile.n), triton.cdiv(K, tile.k)
    blocks = mask_bits.new_empty(panels, max(k_blocks, 1))
    counts = mask_bits.new_empty(panels)
    with torch.cuda.device_of(x):
        list_blocks_kernel[(panels,)](
            mask_bits_ptr=mask_bits, N=N, words=words, k_blocks=k_blocks, blocks_ptr=blocks,
            counts_ptr=counts, BLOCK_N=tile.n, WORDS=tile.k // 32, STEP=_LIST_STEP, num_warps=4,
        )  # fmt: skip
        masked_linear_kernel[(triton.cdiv(M, tile.m) * panels,)](
            x_ptr=x, weight_ptr=weight, mask_bits_ptr=mask_bits, bias_ptr=bias, blocks_ptr=blocks,
            counts_ptr=counts, y_ptr=y, M=M, N=N, K=K, words=words, k_blocks=k_blocks,
            HAS_BIAS=bias is not None, EVEN_K=K % tile.k == 0, PRECISION=precision(x.dtype),
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_M=_GROUP_M,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def precision(dtype: torch.dtype) -> str:
    """Return Triton's name of the way products of this dtype are taken."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if dtype == torch.float32 and exact else "tf32"
