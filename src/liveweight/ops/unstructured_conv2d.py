"""Convolution whose weight lacks single entries anywhere: y = pool(act(conv2d(x, W) + b))."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liveweight import _library, reference
from liveweight._check import cast_like, check_bias, make_pair
from liveweight.formats import UnstructuredKernels
from liveweight.ops.unstructured_linear import check_activation

Pair = tuple[int, int]
_NAME = "unstructured_conv2d"
_LAYOUTS = ("contiguous", "channels_last", "batch_last")
_CONTIGUOUS, _CHANNELS_LAST, _BATCH_LAST = range(3)
_aten = torch.ops.aten


def unstructured_conv2d(
    x: Tensor,
    weight: UnstructuredKernels,
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

    x           [B, C, H, W] or [C, H, W] float32 or bfloat16, any strides (other dtypes, and
                devices without a kernel: plain PyTorch); bfloat16 is added up in float32 and
                rounded once, in gradients as well
    weight      (Cout, C / groups, kh, kw), values like x
    bias        [Cout] like x, or None
    activation  None or "relu"
    pool        p x p max pool of stride p after the activation, ragged edges dropped; 1: none
    layout      how y lies in memory: "contiguous", "channels_last", "batch_last" (samples side by
                side; same shape and numbers), or None: as x lies
    returns     [B, Cout, H', W'] or [Cout, H', W'] like x

    Differentiable once, in x, the values and the bias. The index values of weight are not checked
    here: UnstructuredKernels.from_dense and UnstructuredKernels.validate vouch for them.
    Raises ValueError (shapes, sizes, names) and TypeError (types, dtypes).
    """
    if not isinstance(weight, UnstructuredKernels):
        got = type(weight).__name__
        raise TypeError(f"{_NAME}: weight must be formats.UnstructuredKernels, got {got}")
    parts = (weight.values, weight.columns, weight.segments, weight.offsets)
    sizes = (
        make_pair(_NAME, "stride", stride, 1),
        make_pair(_NAME, "padding", padding, 0),
        make_pair(_NAME, "dilation", dilation, 1),
    )
    relu = check_activation(activation)
    if not isinstance(pool, int) or pool < 1:
        raise ValueError(f"{_NAME}: pool must be a whole number >= 1, got {pool!r}")
    if layout is not None and layout not in _LAYOUTS:
        raise ValueError(f"{_NAME}: layout must be None or one of {_LAYOUTS}, got {layout!r}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{_NAME}: {weight.shape[0]} filters do not form groups={groups}")
    return apply_unstructured_conv(
        x, *parts, weight.shape, weight.tile, bias, *sizes, groups, relu, pool, layout
    )


def apply_unstructured_conv(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    segments: Tensor,
    offsets: Tensor,
    shape: tuple[int, int, int, int],
    tile: Pair,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
    pool: int,
    layout: str | None = None,
) -> Tensor:
    """Check the operands, add a batch of one where needed and run the op; weight comes unpacked."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{_NAME}: x must be a tensor, got {type(x).__name__}")
    index = (values, columns, segments, offsets, shape, tile)
    if x.dim() == 3:
        rest = (bias, stride, padding, dilation, groups, relu, pool, layout)
        return apply_unstructured_conv(x[None], *index, *rest)[0]
    x = _check(x, values, shape, groups, bias)
    for d in (0, 1):
        room = x.size(2 + d) + 2 * padding[d] - dilation[d] * (shape[2 + d] - 1) - 1
        if room < 0 or room // stride[d] + 1 < pool:
            _raise_too_small(x, shape, stride, padding, dilation, pool)
    number = _layout_of(x) if layout is None else _LAYOUTS.index(layout)
    args = (x, *index, bias, stride, padding, dilation, groups, relu, pool, number)
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _UnstructuredConv2d.apply(*args)
    return _forward(*args)


def _check(
    x: Tensor, values: Tensor, shape: tuple[int, ...], groups: int, bias: Tensor | None
) -> Tensor:
    """Return x, cast under autocast as nn.Conv2d does; raise where operands do not fit."""
    if x.dim() != 4 or x.size(1) != shape[1] * groups:
        wanted, got = shape[1] * groups, tuple(x.shape)
        raise ValueError(f"{_NAME}: expected x [B, {wanted}, H, W] or one sample, got {got}")
    if x.dtype is not values.dtype:
        x = cast_like(_NAME, x, values)
    if bias is not None:
        check_bias(_NAME, bias, shape[0], values)
    return x


def _raise_too_small(x, shape, stride, padding, dilation, pool) -> None:
    size, kernel = tuple(x.shape[2:]), tuple(shape[2:])
    raise ValueError(
        f"{_NAME}: x of {size} is too small for kernel {kernel}, stride {stride}, "
        f"padding {padding}, dilation {dilation}, pool {pool}: the convolution gives "
        f"{reference.conv2d_size(size, kernel, stride, padding, dilation)}"
    )


def _layout_of(x: Tensor) -> int:
    """Return the number of the layout that x has; contiguous where it has none, or several."""
    if x.is_contiguous():
        return _CONTIGUOUS
    if x.is_contiguous(memory_format=torch.channels_last):
        return _CHANNELS_LAST
    return _BATCH_LAST if x.permute(1, 2, 3, 0).is_contiguous() else _CONTIGUOUS


def _run(op, plain, x: Tensor, *args) -> Tensor:
    """Return op(x, *args), or its reference where the op's CPU kernel does not know the dtype.

    The kernel adds up in float32: bfloat16 is widened before and rounded after it.
    """
    if not x.is_cpu or x.dtype is torch.float32:
        return op(x, *args)
    if x.dtype is not torch.bfloat16:
        return plain(x, *args)
    return op(*(_widen(value) for value in (x, *args))).to(x.dtype)


def _widen(value):
    is_narrow = isinstance(value, Tensor) and value.dtype is torch.bfloat16
    return value.float() if is_narrow else value


def _forward(x, *rest) -> Tensor:
    return _run(_op, reference.unstructured_conv2d, x, *rest)


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


class _UnstructuredConv2d(torch.autograd.Function):
    """Gradients of the fused op; where a pool is fused, the values before it are computed again."""

    @staticmethod
    def forward(ctx, x, values, columns, segments, offsets, shape, tile, bias, *settings):
        y = _forward(x, values, columns, segments, offsets, shape, tile, bias, *settings)
        *settings, relu, pool, _ = settings
        kept_output = y if relu and pool == 1 else None
        ctx.save_for_backward(x, values, columns, segments, offsets, bias, kept_output)
        ctx.sizes, ctx.settings, ctx.epilogue = (shape, tile), tuple(settings), (relu, pool)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, values, columns, segments, offsets, bias, y = ctx.saved_tensors
        relu, pool = ctx.epilogue
        index, settings = (columns, segments, offsets, *ctx.sizes), ctx.settings
        if pool > 1:
            before = _forward(x, values, *index, bias, *settings, False, 1, _CONTIGUOUS)
            grad = _through_epilogue(grad.contiguous(), before, relu, pool)
        elif relu:
            grad = _aten.threshold_backward(grad, y, 0)
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            plain = reference.unstructured_conv2d_grad_x
            grad_x = _run(_op_x, plain, grad, values, *index, x.shape, *settings)
        if ctx.needs_input_grad[1]:
            plain = reference.unstructured_conv2d_grad_values
            grad_values = _run(_op_values, plain, grad, x, *index, *settings)
        if ctx.needs_input_grad[7]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_values, None, None, None, None, None, grad_bias, *(None,) * 7


def _fake(
    x,
    values,
    columns,
    segments,
    offsets,
    shape,
    tile,
    bias,
    stride,
    padding,
    dilation,
    groups,
    relu,
    pool,
    layout,
):
    height, width = reference.conv2d_size(x.shape[2:], shape[2:], stride, padding, dilation)
    batch, height, width = x.shape[0], height // pool, width // pool
    if layout == _BATCH_LAST:
        return x.new_empty(shape[0], height, width, batch).permute(3, 0, 1, 2)
    if layout == _CHANNELS_LAST:
        return x.new_empty(batch, height, width, shape[0]).permute(0, 3, 1, 2)
    return x.new_empty(batch, shape[0], height, width)


def _fake_grad_x(grad, values, columns, segments, offsets, shape, tile, x_shape, *settings):
    return grad.new_empty(tuple(x_shape))


def _fake_grad_values(grad, x, columns, *rest):
    return x.new_empty(columns.shape[0])


_library.register(_NAME, reference.unstructured_conv2d, _fake)
_library.register(f"{_NAME}_grad_x", reference.unstructured_conv2d_grad_x, _fake_grad_x)
_library.register(
    f"{_NAME}_grad_values", reference.unstructured_conv2d_grad_values, _fake_grad_values
)
_op = torch.ops.liveweight.unstructured_conv2d.default
_op_x = torch.ops.liveweight.unstructured_conv2d_grad_x.default
_op_values = torch.ops.liveweight.unstructured_conv2d_grad_values.default
