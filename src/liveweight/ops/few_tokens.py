"""Bitmaps and deltas by the names of their formats: what SparseLinear calls."""

from __future__ import annotations

from torch import Tensor

from liveweight.ops.few_tokens_grad import few_tokens_linear
from liveweight.ops.unstructured_linear import check_operands


def apply_few_tokens(
    format: str,
    x: Tensor,
    values: Tensor,
    index: tuple[Tensor, ...],
    sizes: tuple[object, ...],
    bias: Tensor | None,
    activation: int,
    batch_last: bool = False,
) -> Tensor:
    """Check the operands, flatten the batch and run <format>_linear; weight comes in parts.

    index, sizes  tensors and numbers of the format beside its values; sizes[0] is (N, K)
    batch_last    lay y out with the samples of a feature side by side, by a copy
    """
    N, K = sizes[0]
    x = check_operands(f"{format}_linear", x, values, (N, K), bias)
    flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), K)
    y = few_tokens_linear(format, flat.contiguous(), values, index, sizes, bias, activation)
    if batch_last:
        y = y.t().contiguous().t()
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], N)
