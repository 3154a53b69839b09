"""Linear layers with single weights missing, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from liveweight.reference.parts import batches, row_of


def unstructured_linear(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """Return act(x W^T + bias) [M, N] for x [M, K] and W [N, K] in compressed sparse rows.

    y[m, n] = act(bias[n] + sum of values[i] x[m, columns[i]] over the entries i of row n).
    Only kept entries are multiplied: inf and NaN of x reach no output through a removed weight.
    """
    columns, rows = columns.long(), row_of(row_offsets, columns.numel())
    out = x.new_zeros(x.shape[0], row_offsets.numel() - 1)
    for start, length in batches(x.shape[0], columns.numel()):
        part = x.narrow(0, start, length)
        out.narrow(0, start, length).index_add_(1, rows, part[:, columns] * values)
    if bias is not None:
        out += bias
    return out.relu_() if relu else out


def unstructured_linear_grad_x(
    grad: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, in_features: int
) -> Tensor:
    """Return grad W [M, K] for grad [M, N]: the gradient of unstructured_linear to x."""
    columns, rows = columns.long(), row_of(row_offsets, columns.numel())
    out = grad.new_zeros(grad.shape[0], in_features)
    for start, length in batches(grad.shape[0], columns.numel()):
        part = grad.narrow(0, start, length)
        out.narrow(0, start, length).index_add_(1, columns, part[:, rows] * values)
    return out


def unstructured_linear_grad_values(
    grad: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor
) -> Tensor:
    """Return sum over m of grad[m, n] x[m, columns[i]] for each kept entry i of row n: [nnz]."""
    columns, rows = columns.long(), row_of(row_offsets, columns.numel())
    out = x.new_zeros(columns.numel())
    for start, length in batches(x.shape[0], columns.numel()):
        part, g = x.narrow(0, start, length), grad.narrow(0, start, length)
        out += (g[:, rows] * part[:, columns]).sum(0)
    return out
