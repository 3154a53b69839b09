"""What happens to fp32 sums before they are stored, and the sum of parts that were cut."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv

_ENTRIES = 1024  # of the output, per program of finish_kernel


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """Return act(y) for fp32 y: 0 none, 1 ReLU, 2 exact GELU, 3 its tanh form."""
    if ACTIVATION == 1:
        y = tl.where(y < 0, 0.0, y)  # keeps NaN, which a maximum would drop
    elif ACTIVATION == 2:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == 3:
        # 0.5 (1 + tanh(u)) = sigmoid(2 u), here with 2 u = 2 sqrt(2 / pi) (y + 0.044715 y^3)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y


@triton.jit
def store_tile(y, y_ptr, bias_ptr, m, n, M, N, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Store act(y + bias), rows from m and columns from n on, into y_ptr [M, N]."""
    m += tl.arange(0, y.shape[0])
    n += tl.arange(0, y.shape[1])
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    at = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def finish_kernel(
    work_ptr, bias_ptr, out_ptr, count, N,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """out[i] = act(sum of work[part, i] + bias[i % N]) for i < count; parts in their order."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < count
    y = tl.zeros((ENTRIES,), tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(work_ptr + part * tl.cast(count, tl.int64) + entry, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + entry % N, mask=inside, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    tl.store(out_ptr + entry, y.to(out_ptr.dtype.element_ty), mask=inside)


def finish(work: Tensor, out: Tensor, bias: Tensor | None = None, activation: int = 0) -> None:
    """Write act(sum of the parts + bias) into out, in the same order at every call.

    work  [parts, ...] float32 contiguous
    out   [..., N] contiguous, any float dtype
    bias  [N] or None
    """
    count = out.numel()
    if count == 0:
        return
    with torch.cuda.device_of(out):
        finish_kernel[(cdiv(count, _ENTRIES),)](
            work_ptr=work, bias_ptr=bias, out_ptr=out, count=count, N=out.shape[-1],
            PARTS=work.shape[0], HAS_BIAS=bias is not None, ACTIVATION=activation,
            ENTRIES=_ENTRIES, num_warps=4,
        )  # fmt: skip
