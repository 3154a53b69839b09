"""Gradients of kernelwise_conv2d from convolutions that exist: for GPUs, and checked on any device.

To x: with stride 1 the same sparse convolution with the kernels turned around and sorted by their
input channel, otherwise PyTorch's dense one. To the values: PyTorch's dense one, then a gather.
Nothing here waits for the GPU, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from liveweight.reference.kernelwise_conv2d import input_channels
from liveweight.reference.parts import row_of

Pair = tuple[int, int]


def turns_around(kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> bool:
    """Return whether the gradient to x is itself a convolution of stride 1 with some padding."""
    reach = [dilation[d] * (kernel_size[d] - 1) - padding[d] for d in (0, 1)]
    return tuple(stride) == (1, 1) and min(reach) >= 0


def turn_around(
    values: Tensor, filter_offsets: Tensor, channels: Tensor, sizes: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (values, filter_offsets, channels) of the convolution that maps grad to x's gradient.

    Its filters are the Cin input channels, its channels the filters of a group; kernels are
    rotated by half a turn. sizes = (Cout, Cin, groups).
    """
    count, in_channels, groups = sizes
    filters = row_of(filter_offsets, channels.numel())
    targets = input_channels(filters, channels, sizes)
    # Kernels come sorted by filter, and a stable sort keeps that order inside a target.
    order = torch.argsort(targets, stable=True)
    ends = torch.zeros(in_channels + 1, dtype=torch.long, device=channels.device)
    ends.index_add_(0, targets + 1, torch.ones_like(targets))
    per_group = count // groups if groups else 1
    inside = (filters % max(per_group, 1))[order].to(torch.int32)
    return values.flip(1, 2)[order], ends.cumsum(0).to(torch.int32), inside


def grad_x(
    run,
    grad: Tensor,
    values: Tensor,
    filter_offsets: Tensor,
    channels: Tensor,
    x_shape: tuple[int, ...],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """Return the gradient of kernelwise_conv2d (bias, activation and pool apart) to x: x_shape.

    run   the op kernelwise_conv2d itself, or its reference
    grad  [B, Cout, H', W'] like values

    A dense convolution (stride above 1, or padding beyond the kernel) carries NaN and infinity of
    grad to every channel; the sparse one only through kept kernels.
    """
    kernel_size = tuple(values.shape[1:])
    sizes = (grad.shape[1], x_shape[1], groups)
    if turns_around(kernel_size, stride, padding, dilation):
        turned = turn_around(values, filter_offsets, channels, sizes)
        margin = [dilation[d] * (kernel_size[d] - 1) - padding[d] for d in (0, 1)]
        return run(grad, *turned, None, (1, 1), margin, dilation, groups, False, 1, 0)
    filters = row_of(filter_offsets, channels.numel())
    dense = values.new_zeros(grad.shape[1], x_shape[1] // groups, *kernel_size)
    dense = dense.index_put((filters, channels.long()), values)
    return conv2d_input(tuple(x_shape), dense, grad, stride, padding, dilation, groups)


def grad_values(
    grad: Tensor,
    x: Tensor,
    filter_offsets: Tensor,
    channels: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """Return the gradient of kernelwise_conv2d to its values [kept, kh, kw], at dense cost."""
    filters = row_of(filter_offsets, channels.numel())
    shape = (grad.shape[1], x.shape[1] // groups, *kernel_size)
    dense = conv2d_weight(x, shape, grad, stride, padding, dilation, groups)
    return dense[filters, channels.long()]
