"""Linear layer whose weight lacks most of its entries, for few samples: y = act(x W^T + b)."""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight import _library, reference
from liveweight.formats import Delta
from liveweight.ops.activation import activation_code
from liveweight.ops.few_tokens_grad import few_tokens_linear
from liveweight.ops.unstructured_linear import check_operands

_NAME = "delta_linear"


def delta_linear(
    x: Tensor,
    weight: Delta,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """Apply a weight-sparse linear layer: y = act(x W^T + b).

    x           [..., K] bfloat16 or float16 on a GPU, added up in fp32 (other dtypes, and devices
                without a kernel: plain PyTorch)
    weight      [N, K], values like x
    bias        [N] like x, or None
    activation  None, "relu", "gelu" or "gelu_tanh"
    returns     [..., N] like x

    Made for 1 to 8 samples and more than about three quarters of the weights removed. More samples
    take passes of 8 while that is faster than a dense product, which the kernel then does; only
    there NaN and inf of x pass through removed weights, as in a dense layer.
    Differentiable once, in x, the values and the bias; fillers among the values have gradient 0.
    The index values of weight are not checked here: Delta.from_dense and Delta.validate vouch for
    them. Raises ValueError (shapes, names) and TypeError (types, dtypes).
    """
    if not isinstance(weight, Delta):
        raise TypeError(f"{_NAME}: weight must be formats.Delta, got {type(weight).__name__}")
    code = activation_code(activation)
    index = (weight.deltas, weight.starts, weight.order, weight.offsets)
    return apply_delta(x, weight.values, *index, weight.shape, weight.layout, bias, code)


def apply_delta(
    x: Tensor,
    values: Tensor,
    deltas: Tensor,
    starts: Tensor,
    order: Tensor,
    offsets: Tensor,
    shape: tuple[int, int],
    layout: tuple[int, int, int, int, int],
    bias: Tensor | None,
    activation: int,
) -> Tensor:
    """Check the operands, flatten the batch and run the op; the parts of weight come unpacked."""
    N, K = shape
    x = check_operands(_NAME, x, values, shape, bias)
    flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), K)
    index, sizes = (deltas, starts, order, offsets), (shape, layout)
    y = few_tokens_linear("delta", flat.contiguous(), values, index, sizes, bias, activation)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], N)


def delta_to_dense(weight: Delta) -> Tensor:
    """Return W [N, K], a new tensor: the op behind Delta.to_dense, with a kernel on GPUs.

    Raises TypeError unless weight is a Delta.
    """
    if not isinstance(weight, Delta):
        raise TypeError(
            f"delta_to_dense: weight must be formats.Delta, got {type(weight).__name__}"
        )
    index = (weight.deltas, weight.starts, weight.order, weight.offsets)
    return _op_dense(weight.values, *index, weight.shape, weight.layout)


def _fake(x, values, deltas, starts, order, offsets, shape, layout, bias, activation):
    return x.new_empty(x.shape[0], shape[0])


def _fake_dense(values, deltas, starts, order, offsets, shape, layout):
    return values.new_empty(shape)


def _fake_grad_values(grad, x, values, deltas, starts, order, offsets, shape, layout):
    return torch.empty_like(values)


_library.register(_NAME, reference.delta_linear, _fake)
_library.register("delta_to_dense", reference.delta_to_dense, _fake_dense)
_library.register("delta_linear_grad_values", reference.delta_linear_grad_values, _fake_grad_values)
_op_dense = torch.ops.liveweight.delta_to_dense.default
