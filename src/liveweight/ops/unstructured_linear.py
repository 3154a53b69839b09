"""Linear layer whose weight lacks single entries anywhere: y = act(x W^T + b)."""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight import _library, reference
from liveweight._check import cast_like, check_bias
from liveweight.formats import Unstructured
from liveweight.ops.activation import activation_code
from liveweight.ops.unstructured_linear_grad import FORWARD_DTYPES, UnstructuredLinear, select

_NAME = "unstructured_linear"


def unstructured_linear(
    x: Tensor,
    weight: Unstructured,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    batch_last: bool = False,
) -> Tensor:
    """Apply a weight-sparse linear layer: y = act(x W^T + b).

    x           [..., K] float32 or bfloat16, added up in fp32 (other dtypes, and devices without a
                kernel: plain PyTorch)
    weight      [N, K], values like x
    bias        [N] like x, or None
    activation  None, "relu", "gelu" or "gelu_tanh"
    batch_last  lay y out with the samples of a feature side by side: y.t() is contiguous. An x laid
                out like that is read as it is; values are the same either way
    returns     [..., N] like x

    Differentiable once, in x, the values and the bias. The index values of weight are not checked
    here: Unstructured.from_dense and Unstructured.validate vouch for them.
    Raises ValueError (shapes, names) and TypeError (types, dtypes).
    """
    if not isinstance(weight, Unstructured):
        raise TypeError(
            f"{_NAME}: weight must be formats.Unstructured, got {type(weight).__name__}"
        )
    parts = (weight.values, weight.columns, weight.segments, weight.offsets, weight.bits)
    code = activation_code(activation)
    return apply_unstructured(x, *parts, weight.tile, weight.shape, bias, code, batch_last)


def apply_unstructured(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    segments: Tensor,
    offsets: Tensor,
    bits: Tensor,
    tile: tuple[int, int],
    shape: tuple[int, int],
    bias: Tensor | None,
    activation: int,
    batch_last: bool = False,
) -> Tensor:
    """Check the operands, flatten the batch and run the op; the parts of weight come unpacked."""
    N, K = shape
    x = check_operands(_NAME, x, values, shape, bias)
    flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), K)
    if not (flat.is_contiguous() or flat.t().is_contiguous()):
        flat = flat.contiguous()
    args = (flat, values, columns, segments, offsets, bits, tile, N, bias, activation, batch_last)
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = UnstructuredLinear.apply(*args)
    else:
        y = select(_op, reference.unstructured_linear, flat, FORWARD_DTYPES)(*args)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], N)


def check_operands(
    op: str, x: Tensor, values: Tensor, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """Return x, cast under autocast as nn.Linear does; raise where operands do not fit."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.size(-1) != shape[1]:
        raise ValueError(f"{op}: expected x [..., {shape[1]}], got {tuple(x.shape)}")
    if x.dtype is not values.dtype:
        x = cast_like(op, x, values)
    if bias is not None:
        check_bias(op, bias, shape[0], values)
    return x


def check_activation(activation: str | None) -> bool:
    """Return whether the activation is ReLU; raise ValueError for names that are not known."""
    if activation is None:
        return False
    if activation != "relu":
        raise ValueError(f"activation must be None or 'relu', got {activation!r}")
    return True


def _fake(
    x, values, columns, segments, offsets, bits, tile, out_features, bias, activation, batch_last
):
    if batch_last:
        return x.new_empty(out_features, x.shape[0]).t()
    return x.new_empty(x.shape[0], out_features)


_library.register(_NAME, reference.unstructured_linear, _fake)
_op = torch.ops.liveweight.unstructured_linear.default
