"""Linear layer whose weight lacks single entries anywhere: y = act(x W^T + b)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liveweight import _library, reference
from liveweight.formats import Unstructured

_float32 = torch.float32


def unstructured_linear(
    x: Tensor,
    weight: Unstructured,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """Apply a weight-sparse linear layer: y = act(x W^T + b).

    x           [..., K] float32 (other dtypes, and devices without a kernel: plain PyTorch)
    weight      [N, K], values like x
    bias        [N] like x, or None
    activation  None or "relu"
    returns     [..., N] like x

    Differentiable once, in x, the values and the bias. The index values of weight are not checked
    here: Unstructured.from_dense and Unstructured.validate vouch for them.
    Raises ValueError (shapes, names) and TypeError (types, dtypes).
    """
    if not isinstance(weight, Unstructured):
        raise TypeError(
            f"unstructured_linear: weight must be formats.Unstructured, got {type(weight).__name__}"
        )
    parts = (weight.values, weight.row_offsets, weight.columns)
    return apply_unstructured(x, *parts, weight.shape[1], bias, check_activation(activation))


def check_activation(activation: str | None) -> bool:
    """Return whether the activation is ReLU; raise ValueError for names that are not known."""
    if activation is None:
        return False
    if activation != "relu":
        raise ValueError(f"activation must be None or 'relu', got {activation!r}")
    return True


def apply_unstructured(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    in_features: int,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """Check the operands, flatten the batch and run the op; the parts of weight come unpacked."""
    x = _check(x, values, row_offsets, in_features, bias)
    flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), in_features)
    if not flat.is_contiguous():
        flat = flat.contiguous()
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = _UnstructuredLinear.apply(flat, values, row_offsets, columns, bias, relu)
    else:
        y = _forward(flat, values, row_offsets, columns, bias, relu)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _check(
    x: Tensor, values: Tensor, row_offsets: Tensor, in_features: int, bias: Tensor | None
) -> Tensor:
    """Return x, cast under autocast as nn.Linear does; raise where operands do not fit."""
    name = "unstructured_linear"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.size(-1) != in_features:
        raise ValueError(f"{name}: expected x [..., {in_features}], got {tuple(x.shape)}")
    if x.dtype is not values.dtype:
        if not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise TypeError(f"{name}: expected x {_dtype(values)} like values, got {_dtype(x)}")
        x = x.to(values.dtype)
    if bias is not None:
        check_bias(name, bias, row_offsets.numel() - 1, values.dtype)
    return x


def check_bias(op: str, bias: Tensor, size: int, dtype: torch.dtype) -> None:
    """Raise TypeError or ValueError unless bias is a tensor [size] of this dtype."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: bias must be a tensor or None, got {type(bias).__name__}")
    if bias.dim() != 1 or bias.size(0) != size:
        raise ValueError(f"{op}: expected bias [{size}], got {tuple(bias.shape)}")
    if bias.dtype is not dtype:
        wanted = str(dtype).removeprefix("torch.")
        raise TypeError(f"{op}: expected bias {wanted}, got {_dtype(bias)}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _select(op, plain, dtype: torch.dtype, is_cpu: bool):
    """Return the op, or its reference where the op's CPU kernel does not know the dtype."""
    return plain if is_cpu and dtype is not _float32 else op


def _forward(x, values, row_offsets, columns, bias, relu) -> Tensor:
    run = _select(_op, reference.unstructured_linear, x.dtype, x.is_cpu)
    return run(x, values, row_offsets, columns, bias, relu)


class _UnstructuredLinear(torch.autograd.Function):
    """grad_x = G W, grad_W[n, k] = sum_m G[m, n] x[m, k] where kept, G = grad where y > 0."""

    @staticmethod
    def forward(ctx, x, values, row_offsets, columns, bias, relu):
        y = _forward(x, values, row_offsets, columns, bias, relu)
        ctx.save_for_backward(x, values, row_offsets, columns, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, values, row_offsets, columns, y = ctx.saved_tensors
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad = grad.contiguous()
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            run = _select(_op_x, reference.unstructured_linear_grad_x, x.dtype, x.is_cpu)
            grad_x = run(grad, values, row_offsets, columns, x.shape[1])
        if ctx.needs_input_grad[1]:
            run = _select(_op_values, reference.unstructured_linear_grad_values, x.dtype, x.is_cpu)
            grad_values = run(grad, x, row_offsets, columns)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.sum(0)
        return grad_x, grad_values, None, None, grad_bias, None


def _fake(x, values, row_offsets, columns, bias, relu):
    return x.new_empty(x.shape[0], row_offsets.shape[0] - 1)


def _fake_grad_x(grad, values, row_offsets, columns, in_features):
    return grad.new_empty(grad.shape[0], in_features)


def _fake_grad_values(grad, x, row_offsets, columns):
    return x.new_empty(columns.shape[0])


_library.register("unstructured_linear", reference.unstructured_linear, _fake)
_library.register("unstructured_linear_grad_x", reference.unstructured_linear_grad_x, _fake_grad_x)
_library.register(
    "unstructured_linear_grad_values", reference.unstructured_linear_grad_values, _fake_grad_values
)
_op = torch.ops.liveweight.unstructured_linear.default
_op_x = torch.ops.liveweight.unstructured_linear_grad_x.default
_op_values = torch.ops.liveweight.unstructured_linear_grad_values.default
