"""Convolution whose weight lacks blocks of filters x channels: y = act(conv2d(x, W) + b)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liveweight import _library, reference
from liveweight._check import cast_like, check_bias, make_pair
from liveweight.formats import BlockKernels
from liveweight.ops.unstructured_linear import check_activation
from liveweight.reference.layouts import CHANNELS_LAST, empty_in

Pair = tuple[int, int]
_NAME = "block_conv2d"
_channels_last = torch.channels_last


def block_conv2d(
    x: Tensor,
    weight: BlockKernels,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Apply a convolution whose weight is a list of blocks: y = act(conv2d(x, W) + b).

    x           [B, C, H, W] or [C, H, W], any floating dtype; added up in fp32 where narrower.
                Computed in channels_last: any other layout is copied to it first, which costs a
                read and a write of x
    weight      (Cout, C / groups, kh, kw), values like x; under groups > 1 its blocks must have a
                number of filters that divides Cout / groups
    bias        [Cout] like x, or None
    activation  None or "relu"
    returns     [B, Cout, H', W'] or [Cout, H', W'] like x, in channels_last

    Differentiable once, in x, the values and the bias. Zeros inside kept blocks are multiplied. A
    GPU kernel serves it where both sides of blocks are 16, 32, 64 or 128; every row of blocks reads
    x anew, so those of 64 and 128 filters are the fast ones. On a CPU plain PyTorch serves it, and
    kernelwise_conv2d is the faster op. The index values of weight are not checked here:
    BlockKernels.from_dense and BlockKernels.validate vouch for them. On a GPU float32 products are
    taken as PyTorch's own convolutions take them: in TF32, unless torch.backends.cudnn.allow_tf32
    is False.
    Raises ValueError (shapes, sizes, names) and TypeError (types, dtypes).
    """
    if not isinstance(weight, BlockKernels):
        got = type(weight).__name__
        raise TypeError(f"{_NAME}: weight must be formats.BlockKernels, got {got}")
    sizes = (
        make_pair(_NAME, "stride", stride, 1),
        make_pair(_NAME, "padding", padding, 0),
        make_pair(_NAME, "dilation", dilation, 1),
    )
    relu = check_activation(activation)
    parts = (weight.values, weight.row_offsets, weight.columns, weight.schedule, weight.shape)
    return apply_block_conv(x, *parts, bias, *sizes, groups, relu)


def apply_block_conv(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    schedule: Tensor,
    shape: tuple[int, int, int, int],
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    relu: bool,
) -> Tensor:
    """Check the operands, add a batch of one where needed and run the op; weight comes unpacked."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{_NAME}: x must be a tensor, got {type(x).__name__}")
    index = (values, row_offsets, columns, schedule, shape)
    settings = (stride, padding, dilation, groups)
    if x.dim() == 3:
        return apply_block_conv(x[None], *index, bias, *settings, relu)[0]
    check_groups(shape, values.shape[3], groups)
    x = _check(x, values, shape, groups, bias)
    size = reference.conv2d_size(x.shape[2:], shape[2:], stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(
            f"{_NAME}: x of {tuple(x.shape[2:])} is too small for kernel {tuple(shape[2:])}, "
            f"padding {padding}, dilation {dilation}: the convolution gives {size}"
        )
    args = (x, *index, bias, *settings, relu)
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _BlockConv2d.apply(*args)
    return _op(*args)


def check_groups(shape: tuple[int, ...], rows: int, groups: int) -> None:
    """Raise ValueError where panels of so many filters would cross the groups of a convolution."""
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"{_NAME}: {shape[0]} filters do not form groups={groups}")
    if groups > 1 and shape[0] // groups % rows:
        raise ValueError(
            f"{_NAME}: blocks of {rows} filters cross groups: with groups={groups} their number "
            f"must divide {shape[0] // groups}, the filters of a group"
        )


def _check(
    x: Tensor, values: Tensor, shape: tuple[int, ...], groups: int, bias: Tensor | None
) -> Tensor:
    """Return x, cast under autocast as nn.Conv2d does; raise where operands do not fit."""
    wanted, got = shape[1] * groups, tuple(x.shape)
    if x.dim() != 4 or x.size(1) != wanted:
        raise ValueError(f"{_NAME}: expected x [B, {wanted}, H, W] or one sample, got {got}")
    if x.device != values.device:
        raise ValueError(f"{_NAME}: x is on {x.device}, expected {values.device} like values")
    if x.dtype is not values.dtype:
        x = cast_like(_NAME, x, values)
    if bias is not None:
        check_bias(_NAME, bias, shape[0], values)
    return x


class _BlockConv2d(torch.autograd.Function):
    """Gradients of the fused op; G is grad where the output is positive, if a ReLU is fused.

    grad_x = conv_transpose2d(G, W), grad_W = the correlation of x with G in kept blocks.
    """

    @staticmethod
    def forward(ctx, x, values, row_offsets, columns, schedule, shape, bias, *settings):
        index = (row_offsets, columns, schedule)
        y = _op(x, values, *index, shape, bias, *settings)
        *ctx.settings, ctx.relu = settings
        ctx.save_for_backward(x, values, *index, y if ctx.relu else None)
        ctx.shape = shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, values, *index, y = ctx.saved_tensors
        shape, settings = ctx.shape, ctx.settings
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad = grad.contiguous(memory_format=_channels_last)
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _op_x(grad, values, *index, shape, x.shape, *settings)
        if ctx.needs_input_grad[1]:
            block = (values.shape[3], values.shape[2])
            grad_values = _op_values(grad, x, *index, shape, block, *settings)
        if ctx.needs_input_grad[6]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_values, None, None, None, None, grad_bias, *(None,) * 5


def _fake(
    x,
    values,
    row_offsets,
    columns,
    schedule,
    shape,
    bias,
    stride,
    padding,
    dilation,
    groups,
    relu,
):
    size = reference.conv2d_size(x.shape[2:], shape[2:], stride, padding, dilation)
    return empty_in(x, (x.shape[0], shape[0], *size), CHANNELS_LAST)


def _fake_grad_x(grad, values, row_offsets, columns, schedule, shape, x_shape, *settings):
    return empty_in(grad, tuple(x_shape), CHANNELS_LAST)


def _fake_grad_values(grad, x, row_offsets, columns, schedule, shape, block, *settings):
    return x.new_empty(columns.shape[0], shape[2] * shape[3], block[1], block[0])


_library.register(_NAME, reference.block_conv2d, _fake)
_library.register(f"{_NAME}_grad_x", reference.block_conv2d_grad_x, _fake_grad_x)
_library.register(f"{_NAME}_grad_values", reference.block_conv2d_grad_values, _fake_grad_values)
_op = torch.ops.liveweight.block_conv2d.default
_op_x = torch.ops.liveweight.block_conv2d_grad_x.default
_op_values = torch.ops.liveweight.block_conv2d_grad_values.default

try:
    from liveweight.kernels import block_conv2d as _kernel
    from liveweight.kernels import block_conv2d_checks as _checks
    from liveweight.kernels import block_conv2d_grad_values as _kernel_values
    from liveweight.kernels import block_conv2d_grad_x as _kernel_x
except ImportError:  # no Triton: the reference serves CUDA too, and lw.info() says why
    pass
else:
    _warned = False

    def _has_kernel(x: Tensor, block: Pair, shape: tuple[int, ...]) -> bool:
        """Return whether the GPU's kernels serve these blocks; say once that they do not."""
        global _warned
        if _checks.serves(block, shape):
            return x.dtype in _checks.DTYPES  # float64 is there for gradient checks
        if not _warned:
            _warned = True
            sides = ", ".join(map(str, _checks.SIDES))
            warnings.warn(
                f"liveweight.{_NAME} runs its slow PyTorch reference on CUDA: blocks {block} of "
                f"kernels {tuple(shape[2:])} have no kernel there; blocks with sides out of "
                f"{sides} and kernels of at most {_checks.TAPS} taps a side have",
                stacklevel=2,
            )
        return False

    def _launch(x, values, row_offsets, columns, schedule, shape, *rest):
        served = _has_kernel(x, (values.shape[3], values.shape[2]), shape)
        run = _kernel.launch if served else reference.block_conv2d
        return run(x, values, row_offsets, columns, schedule, shape, *rest)

    def _launch_grad_x(grad, values, row_offsets, columns, schedule, shape, *rest):
        served = _has_kernel(grad, (values.shape[3], values.shape[2]), shape)
        run = _kernel_x.launch if served else reference.block_conv2d_grad_x
        return run(grad, values, row_offsets, columns, schedule, shape, *rest)

    def _launch_grad_values(grad, x, row_offsets, columns, schedule, shape, block, *rest):
        served = _has_kernel(grad, tuple(block), shape)
        run = _kernel_values.launch if served else reference.block_conv2d_grad_values
        return run(grad, x, row_offsets, columns, schedule, shape, block, *rest)

    _library.register_triton(_NAME, _launch)
    _library.register_triton(f"{_NAME}_grad_x", _launch_grad_x)
    _library.register_triton(f"{_NAME}_grad_values", _launch_grad_values)
