"""Linear layers with whole blocks missing, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from liveweight.reference.activation import apply_activation
from liveweight.reference.parts import batches, row_of


def block_linear(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    schedule: Tensor,
    shape: Sequence[int],
    bias: Tensor | None,
    activation: int,
    batch_last: bool,
) -> Tensor:
    """Return act(x W^T + bias) [M, N] for x [M, K] and W [N, K] as kept blocks [kept, bw, bh].

    y[m, r * bh + i] = act(bias + sum of values[b, j, i] x[m, columns[b] * bw + j] over the blocks b
    of row r and their columns j). Only kept blocks are multiplied. batch_last: y.t() is contiguous.
    The schedule is for kernels; nothing depends on it.
    Half precision on a CPU is added up in fp32 and rounded once, as the kernel does.
    """
    if x.is_cpu and x.dtype in (torch.bfloat16, torch.float16):
        rest = (shape, None if bias is None else bias.float(), activation, batch_last)
        return block_linear(x.float(), values.float(), row_offsets, columns, schedule, *rest).to(
            x.dtype
        )
    kept, bw, bh = values.shape
    rows, columns = row_of(row_offsets, kept), columns.long()
    parts = _cut(x, bw)
    out = x.new_zeros(x.shape[0], -(-shape[0] // bh), bh)
    for start, length in batches(x.shape[0], kept * max(bh, bw)):
        products = parts.narrow(0, start, length)[:, columns].transpose(0, 1) @ values
        out.narrow(0, start, length).index_add_(1, rows, products.transpose(0, 1))
    y = out.flatten(1)[:, : shape[0]]
    y = apply_activation(y if bias is None else y + bias, activation)
    return y.t().contiguous().t() if batch_last else y.contiguous()


def block_linear_grad_x(
    grad: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    schedule: Tensor,
    shape: Sequence[int],
) -> Tensor:
    """Return grad W [M, K] for grad [M, N]: the gradient of block_linear to x."""
    kept, bw, bh = values.shape
    rows, columns = row_of(row_offsets, kept), columns.long()
    parts = _cut(grad, bh)
    out = grad.new_zeros(grad.shape[0], -(-shape[1] // bw), bw)
    for start, length in batches(grad.shape[0], kept * max(bh, bw)):
        products = parts.narrow(0, start, length)[:, rows].transpose(0, 1) @ values.mT
        out.narrow(0, start, length).index_add_(1, columns, products.transpose(0, 1))
    return out.flatten(1)[:, : shape[1]].contiguous()


def block_linear_grad_values(
    grad: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    schedule: Tensor,
    block: Sequence[int],
) -> Tensor:
    """Return the gradient to the values of blocks (bh, bw): [kept, bw, bh], zero in the padding.

    Entry [b, j, i] is the sum over m of grad[m, r * bh + i] x[m, columns[b] * bw + j], b in row r.
    """
    bh, bw = block
    rows, columns = row_of(row_offsets, columns.numel()), columns.long()
    inputs, grads = _cut(x, bw), _cut(grad, bh)
    out = x.new_zeros(columns.numel(), bw, bh)
    for start, length in batches(x.shape[0], columns.numel() * max(bh, bw)):
        left = inputs.narrow(0, start, length)[:, columns].permute(1, 2, 0)
        out += left @ grads.narrow(0, start, length)[:, rows].transpose(0, 1)
    return out


def _cut(x: Tensor, size: int) -> Tensor:
    """Return x [M, n], padded with zeros, as [M, ceil(n / size), size]."""
    count = -(-x.shape[1] // size)
    return functional.pad(x, (0, count * size - x.shape[1])).reshape(x.shape[0], count, size)
