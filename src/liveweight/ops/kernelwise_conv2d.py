"""Convolution whose weight lacks whole 2-D kernels: y = pool(act(conv2d(x, W) + b))."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liveweight import _library, reference
from liveweight._check import cast_like, check_bias, make_pair
from liveweight.formats import Kernelwise
from liveweight.ops.kernelwise_conv2d_grad import grad_values, grad_x
from liveweight.ops.layout import layout_code
from liveweight.ops.unstructured_linear import check_activation
from liveweight.reference.layouts import CONTIGUOUS, empty_in, find_layout

Pair = tuple[int, int]
_NAME = "kernelwise_conv2d"
_FORWARD_DTYPES = (torch.float32, torch.bfloat16)  # of the CPU kernel of the forward pass
_HALVES = (torch.bfloat16, torch.float16)
_CUDA_DTYPES = (torch.float32, *_HALVES)
_aten = torch.ops.aten


def kernelwise_conv2d(
    x: Tensor,
    weight: Kernelwise,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    activation: str | None = None,
    pool: int = 1,
    layout: str | None = None,
) -> Tensor:
    """Apply a weight-sparse convolution: y = pool(act(conv2d(x, W) + b)).

    x           [B, C, H, W] or [C, H, W] float32 or bfloat16, on a GPU also float16, added up in
                fp32 (other dtypes, and devices without a kernel: plain PyTorch)
    weight      (Cout, C / groups, kh, kw), values like x
    bias        [Cout] like x, or None
    activation  None or "relu"
    pool        p x p max pool of stride p after the activation, ragged edges dropped; 1: none
    layout      of the result in memory: "contiguous", "channels_last", "batch_last" (samples side
                by side: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)), None: like x
    returns     [B, Cout, H', W'] or [Cout, H', W'] like x

    Differentiable once, in x, the values and the bias. The index values of weight are not checked
    here: Kernelwise.from_dense and Kernelwise.validate vouch for them.
    Raises ValueError (shapes, sizes, names) and TypeError (types, dtypes).
    """
    if not isinstance(weight, Kernelwise):
        raise TypeError(f"{_NAME}: weight must be formats.Kernelwise, got {type(weight).__name__}")
    parts = (weight.values, weight.filter_offsets, weight.channels)
    sizes = (
        make_pair(_NAME, "stride", stride, 1),
        make_pair(_NAME, "padding", padding, 0),
        make_pair(_NAME, "dilation", dilation, 1),
    )
    relu = check_activation(activation)
    check_pool(pool)
    code = layout_code(_NAME, layout)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{_NAME}: {weight.shape[0]} filters do not form groups={groups}")
    settings = (*sizes, groups, relu, pool, code)
    return apply_kernelwise(x, *parts, weight.shape[1] * groups, bias, *settings)


def check_pool(pool: int) -> int:
    """Return pool if it is a whole number >= 1; raise ValueError otherwise."""
    if not isinstance(pool, int) or pool < 1:
        raise ValueError(f"{_NAME}: pool must be a whole number >= 1, got {pool!r}")
    return pool


def apply_kernelwise(
    x: Tensor,
    values: Tensor,
    filter_offsets: Tensor,
    channels: Tensor,
    in_channels: int,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
    pool: int,
    layout: int | None = None,
) -> Tensor:
    """Check the operands, add a batch of one where needed and run the op; weight comes unpacked.

    layout  code of the result's layout (reference/layouts.py); None: like x
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{_NAME}: x must be a tensor, got {type(x).__name__}")
    if x.dim() == 3:
        batch = x[None]
        rest = (in_channels, bias, stride, padding, dilation, groups, relu, pool, layout)
        return apply_kernelwise(batch, values, filter_offsets, channels, *rest)[0]
    x = _check(x, values, filter_offsets, in_channels, bias)
    for d in (0, 1):
        room = x.size(2 + d) + 2 * padding[d] - dilation[d] * (values.size(1 + d) - 1) - 1
        if room < 0 or room // stride[d] + 1 < pool:
            _raise_too_small(x, values, stride, padding, dilation, pool)
    found = find_layout(x)
    if found is None:
        found, x = CONTIGUOUS, x.contiguous()
    args = (x, values, filter_offsets, channels, bias)
    args += (stride, padding, dilation, groups, relu, pool, found if layout is None else layout)
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _KernelwiseConv2d.apply(*args)
    return _forward(*args)


def _check(
    x: Tensor, values: Tensor, filter_offsets: Tensor, in_channels: int, bias: Tensor | None
) -> Tensor:
    """Return x, cast under autocast as nn.Conv2d does; raise where operands do not fit."""
    if x.dim() != 4 or x.size(1) != in_channels:
        got = tuple(x.shape)
        raise ValueError(f"{_NAME}: expected x [B, {in_channels}, H, W] or one sample, got {got}")
    if x.dtype is not values.dtype:
        x = cast_like(_NAME, x, values)
    if bias is not None:
        check_bias(_NAME, bias, filter_offsets.numel() - 1, values)
    return x


def _raise_too_small(x, values, stride, padding, dilation, pool) -> None:
    size, kernel = tuple(x.shape[2:]), tuple(values.shape[1:])
    raise ValueError(
        f"{_NAME}: x of {size} is too small for kernel {kernel}, stride {stride}, "
        f"padding {padding}, dilation {dilation}, pool {pool}: the convolution gives "
        f"{reference.conv2d_size(size, kernel, stride, padding, dilation)}"
    )


def _select(op, plain, x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)):
    """Return the op, or its reference where the op's kernel for x's device lacks the dtype."""
    known = dtypes if x.is_cpu else _CUDA_DTYPES if x.is_cuda else (x.dtype,)
    return op if x.dtype in known else plain


def _forward(x, *rest) -> Tensor:
    return _select(_op, reference.kernelwise_conv2d, x, _FORWARD_DTYPES)(x, *rest)


def _widen(tensor: Tensor) -> Tensor:
    """Return a half-precision CPU tensor as float32, others as they are."""
    return tensor.float() if tensor.is_cpu and tensor.dtype in _HALVES else tensor


def _through_epilogue(grad: Tensor, before: Tensor, relu: bool, pool: int) -> Tensor:
    """Return the gradient before pool(act(.)), given `before`, the values there."""
    active = before.relu() if relu else before
    if pool > 1:
        size, none, one = [pool, pool], [0, 0], [1, 1]
        _, chosen = _aten.max_pool2d_with_indices(active, size, size, none, one, False)
        grad = _aten.max_pool2d_with_indices_backward(
            grad, active, size, size, none, one, False, chosen
        )
    return _aten.threshold_backward(grad, active, 0) if relu else grad


def _gradients(wanted, grad: Tensor, x: Tensor, values: Tensor, index, settings):
    """Return the gradients to x and to values, None for those not wanted; grad before the bias."""
    to_x = to_values = None
    kernel, x_shape = values.shape[1:], x.shape
    if x.is_cuda:
        if wanted[0]:
            to_x = grad_x(_forward, grad, values, *index, x_shape, *settings)
        if wanted[1]:
            to_values = grad_values(grad, x, *index, kernel, *settings)
        return to_x, to_values
    dtype = x.dtype
    grad, x = _widen(grad), _widen(x.contiguous())
    if wanted[0]:
        run = _select(_op_x, reference.kernelwise_conv2d_grad_x, x)
        to_x = run(grad, _widen(values), *index, x_shape, *settings).to(dtype)
    if wanted[1]:
        run = _select(_op_values, reference.kernelwise_conv2d_grad_values, x)
        to_values = run(grad, x, *index, kernel, *settings).to(dtype)
    return to_x, to_values


class _KernelwiseConv2d(torch.autograd.Function):
    """Gradients of the fused op; where a pool is fused, the values before it are computed again."""

    @staticmethod
    def forward(
        ctx,
        x,
        values,
        filter_offsets,
        channels,
        bias,
        stride,
        padding,
        dilation,
        groups,
        relu,
        pool,
        layout,
    ):
        settings = (stride, padding, dilation, groups)
        y = _forward(x, values, filter_offsets, channels, bias, *settings, relu, pool, layout)
        kept_output = y if relu and pool == 1 else None
        ctx.save_for_backward(x, values, filter_offsets, channels, bias, kept_output)
        ctx.settings, ctx.epilogue = settings, (relu, pool)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, values, filter_offsets, channels, bias, y = ctx.saved_tensors
        relu, pool = ctx.epilogue
        index, settings = (filter_offsets, channels), ctx.settings
        if pool > 1:
            before = _forward(x, values, *index, bias, *settings, False, 1, CONTIGUOUS)
            grad = _through_epilogue(grad, before, relu, pool)
        elif relu:
            grad = _aten.threshold_backward(grad, y, 0)
        wanted = ctx.needs_input_grad[:2]
        to_x, to_values = _gradients(wanted, grad.contiguous(), x, values, index, settings)
        grad_bias = None
        if ctx.needs_input_grad[4]:
            grad_bias = grad.sum((0, 2, 3))
        return to_x, to_values, None, None, grad_bias, *(None,) * 7


def _fake(
    x, values, filter_offsets, channels, bias, stride, padding, dilation, groups, relu, pool, layout
):
    size, kernel = x.shape[2:], values.shape[1:]
    height, width = reference.conv2d_size(size, kernel, stride, padding, dilation)
    filters = filter_offsets.shape[0] - 1
    return empty_in(x, (x.shape[0], filters, height // pool, width // pool), layout)


def _fake_grad_x(
    grad, values, filter_offsets, channels, x_shape, stride, padding, dilation, groups
):
    return grad.new_empty(tuple(x_shape))


def _fake_grad_values(
    grad, x, filter_offsets, channels, kernel_size, stride, padding, dilation, groups
):
    return x.new_empty(channels.shape[0], *kernel_size)


_library.register(_NAME, reference.kernelwise_conv2d, _fake)
_library.register(f"{_NAME}_grad_x", reference.kernelwise_conv2d_grad_x, _fake_grad_x)
_library.register(
    f"{_NAME}_grad_values", reference.kernelwise_conv2d_grad_values, _fake_grad_values
)
_op = torch.ops.liveweight.kernelwise_conv2d.default
_op_x = torch.ops.liveweight.kernelwise_conv2d_grad_x.default
_op_values = torch.ops.liveweight.kernelwise_conv2d_grad_values.default
