"""Convolutions with whole kernels missing, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d
from torch.nn.grad import conv2d_input, conv2d_weight

from liveweight.reference.layouts import lay_out
from liveweight.reference.parts import batches, row_of


def input_channels(filters: Tensor, channels: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Return the channel of x that each kept kernel reads; sizes = (Cout, Cin, groups)."""
    out_channels, in_channels, groups = sizes
    return channels.long() + filters // (out_channels // groups) * (in_channels // groups)


def kernelwise_conv2d(
    x: Tensor,
    values: Tensor,
    filter_offsets: Tensor,
    channels: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    pool: int,
    layout: int,
) -> Tensor:
    """Return pool(act(conv2d(x, W) + bias)) for W given by its kept kernels.

    x [B, C, H, W], values [kept, kh, kw]; filter o owns the kernels filter_offsets[o] to
    filter_offsets[o + 1], kernel i reads channel channels[i] of the filter's group. pool p is a
    p x p max pool of stride p, ragged edges dropped (p = 1: none). Only kept kernels are
    multiplied: inf and NaN of x reach no output through a removed kernel. layout: that of the
    result, as in reference/layouts.py. Sums run in fp32 where x is narrower.
    """
    kept, kernel_size = channels.numel(), values.shape[1:]
    filters, count = row_of(filter_offsets, kept), filter_offsets.numel() - 1
    source = input_channels(filters, channels, (count, x.shape[1], groups))
    height, width = conv2d_size(x.shape[2:], kernel_size, stride, padding, dilation)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(x.shape[0], count, height, width, dtype=wide)
    if kept:
        for start, length in batches(x.shape[0], kept * max(x[0, 0].numel(), height * width)):
            part = x.narrow(0, start, length)[:, source].to(wide)
            part = conv2d(part, values[:, None].to(wide), None, stride, padding, dilation, kept)
            out.narrow(0, start, length).index_add_(1, filters, part)
    if bias is not None:
        out += bias[:, None, None].to(wide)
    if relu:
        out.relu_()
    return lay_out((max_pool2d(out, pool) if pool > 1 else out).to(x.dtype), layout)


def kernelwise_conv2d_grad_x(
    grad: Tensor,
    values: Tensor,
    filter_offsets: Tensor,
    channels: Tensor,
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the gradient of kernelwise_conv2d (bias, activation and pool apart) to x: x_shape."""
    kept = channels.numel()
    filters = row_of(filter_offsets, kept)
    source = input_channels(filters, channels, (grad.shape[1], x_shape[1], groups))
    out = grad.new_zeros(tuple(x_shape))
    if kept == 0 or grad.numel() == 0:
        return out
    for start, length in batches(x_shape[0], kept * x_shape[2] * x_shape[3]):
        shape = (length, kept, x_shape[2], x_shape[3])
        part = grad.narrow(0, start, length)[:, filters]
        part = conv2d_input(shape, values[:, None], part, stride, padding, dilation, kept)
        out.narrow(0, start, length).index_add_(1, source, part)
    return out


def kernelwise_conv2d_grad_values(
    grad: Tensor,
    x: Tensor,
    filter_offsets: Tensor,
    channels: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the gradient of kernelwise_conv2d (activation and pool apart) to values."""
    kept = channels.numel()
    filters = row_of(filter_offsets, kept)
    source = input_channels(filters, channels, (grad.shape[1], x.shape[1], groups))
    shape = (kept, 1, *kernel_size)
    out = x.new_zeros(kept, *kernel_size)
    if kept == 0 or grad.numel() == 0:
        return out
    for start, length in batches(x.shape[0], kept * x[0, 0].numel()):
        part, g = x.narrow(0, start, length)[:, source], grad.narrow(0, start, length)[:, filters]
        out += conv2d_weight(part, shape, g, stride, padding, dilation, kept)[:, 0]
    return out


def conv2d_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Return (height, width) of a convolution's output; may be below 1 where nothing fits."""
    height, width = (
        (size[d] + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1) // stride[d] + 1
        for d in range(2)
    )
    return height, width
