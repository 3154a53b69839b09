"""Gradients of the linear layers that read packed weights for few samples: bitmap, delta."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liveweight import reference
from liveweight.ops.activation import activation_grad

_RELU = 1


def few_tokens_linear(
    name: str,
    x: Tensor,
    values: Tensor,
    index: tuple[Tensor, ...],
    sizes: tuple[int | tuple[int, ...], ...],
    bias: Tensor | None,
    activation: int,
) -> Tensor:
    """Run op <name>_linear on x [M, K], differentiable once in x, values and bias.

    index  the tensors of the format beside its values
    sizes  its numbers; the ops of a format take (values, *index, *sizes)
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return FewTokensLinear.apply(name, sizes, activation, x, values, bias, *index)
    return _op(f"{name}_linear")(x, values, *index, *sizes, bias, activation)


class FewTokensLinear(torch.autograd.Function):
    """grad_x = G W, grad_W[n, k] = sum_m G[m, n] x[m, k] where kept, G = grad act'(.).

    Gradients come with many samples, for which tensor cores want W dense: grad_x expands it
    (<name>_to_dense) and multiplies; <name>_linear_grad_values multiplies and gathers.
    ReLU's derivative is read from the output. GELU's needs its input: the kernel then leaves the
    activation out, and its result is what is saved.
    """

    @staticmethod
    def forward(ctx, name, sizes, activation, x, values, bias, *index):
        fused = activation if activation <= _RELU else 0
        y = _op(f"{name}_linear")(x, values, *index, *sizes, bias, fused)
        ctx.save_for_backward(x, values, y if activation else None, *index)
        ctx.name, ctx.sizes, ctx.activation = name, sizes, activation
        return y if fused == activation else reference.apply_activation(y, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, values, before, *index = ctx.saved_tensors
        if before is not None:
            grad = activation_grad(grad, before, ctx.activation)
        grad, parts = grad.contiguous(), (values, *index, *ctx.sizes)
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[3:6]
        grad_x = grad_values = grad_bias = None
        if needs_x:
            grad_x = grad @ _op(f"{ctx.name}_to_dense")(*parts)
        if needs_values:
            grad_values = _op(f"{ctx.name}_linear_grad_values")(grad, x, *parts)
        if needs_bias:
            grad_bias = grad.sum(0)
        return None, None, None, grad_x, grad_values, grad_bias, *(None for _ in index)


def _op(name: str):
    return getattr(torch.ops.liveweight, name).default
