"""Gradients of unstructured_linear at sparse cost."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liveweight import _library, reference
from liveweight.ops.activation import activation_grad

_RELU = 1
FORWARD_DTYPES = (torch.float32, torch.bfloat16)  # of the CPU kernel of the forward pass
_HALVES = (torch.bfloat16, torch.float16)


def select(op, plain, x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)):
    """Return the op, or its reference where the op's CPU kernel does not know the dtype."""
    return plain if x.is_cpu and x.dtype not in dtypes else op


def _widen(tensor: Tensor) -> Tensor:
    """Return a half-precision CPU tensor as float32, which the kernels add in; others as they are.

    The casts cost one pass over what the kernel reads once for every kept weight.
    """
    return tensor.float() if tensor.is_cpu and tensor.dtype in _HALVES else tensor


class UnstructuredLinear(torch.autograd.Function):
    """grad_x = G W, grad_W[n, k] = sum_m G[m, n] x[m, k] where kept, G = grad act'(.).

    ReLU's derivative is read from the output. GELU's needs its input: the kernel then leaves the
    activation out, and its result is what is saved.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        values,
        columns,
        segments,
        offsets,
        bits,
        tile,
        out_features,
        bias,
        activation,
        batch_last,
    ):
        run = select(torch.ops.liveweight.unstructured_linear.default, _forward, x, FORWARD_DTYPES)
        fused = activation if activation <= _RELU else 0
        index = (columns, segments, offsets)
        y = run(x, values, *index, bits, tile, out_features, bias, fused, batch_last)
        ctx.save_for_backward(x, values, *index, y if activation else None)
        ctx.tile, ctx.activation = tile, activation
        return y if fused == activation else reference.apply_activation(y, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, values, columns, segments, offsets, before = ctx.saved_tensors
        if before is not None:
            grad = activation_grad(grad, before, ctx.activation)
        grad, index = grad.contiguous(), (columns, segments, offsets, ctx.tile)
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            run = select(_op_x, reference.unstructured_linear_grad_x, _widen(x))
            grad_x = run(_widen(grad), _widen(values), *index, x.shape[1]).to(x.dtype)
        if ctx.needs_input_grad[1]:
            run = select(_op_values, reference.unstructured_linear_grad_values, _widen(x))
            grad_values = run(_widen(grad), _widen(x.contiguous()), *index).to(x.dtype)
        if ctx.needs_input_grad[8]:
            grad_bias = grad.sum(0)
        return grad_x, grad_values, None, None, None, None, None, None, grad_bias, None, None


_forward = reference.unstructured_linear


def _fake_grad_x(grad, values, columns, segments, offsets, tile, in_features):
    return grad.new_empty(grad.shape[0], in_features)


def _fake_grad_values(grad, x, columns, segments, offsets, tile):
    return x.new_empty(columns.shape[0])


_library.register("unstructured_linear_grad_x", reference.unstructured_linear_grad_x, _fake_grad_x)
_library.register(
    "unstructured_linear_grad_values", reference.unstructured_linear_grad_values, _fake_grad_values
)
_op_x = torch.ops.liveweight.unstructured_linear_grad_x.default
_op_values = torch.ops.liveweight.unstructured_linear_grad_values.default
