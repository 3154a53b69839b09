"""Convolutions that lack single weights, in plain PyTorch: a dense weight with zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d
from torch.nn.grad import conv2d_input, conv2d_weight

from liveweight.reference.parts import row_of

# How the output lies in memory, by the number that the ops take.
CONTIGUOUS, CHANNELS_LAST, BATCH_LAST = range(3)


def kernel_coordinates(
    columns: Tensor,
    segments: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    tile: Sequence[int],
) -> Tensor:
    """Return the place of each entry in a dense weight of this shape: int64 [nnz]."""
    taps = shape[2] * shape[3]
    parts = max(-(-shape[1] // tile[1]), 1)
    groups = row_of(offsets[:, 1], segments.shape[0])
    rows = groups // parts * tile[0] + segments[:, 0]
    first = rows * (shape[1] * taps) + groups % parts * (tile[1] * taps)
    counts = segments[:, 1].long() + 1
    return torch.repeat_interleave(first, counts, output_size=columns.numel()) + columns


def scatter_kernels(values, columns, segments, offsets, shape, tile) -> Tensor:
    """Return the dense weight, zeros where no entry is kept."""
    dense = values.new_zeros(shape[0] * shape[1] * shape[2] * shape[3])
    where = kernel_coordinates(columns, segments, offsets, shape, tile)
    return dense.index_put((where,), values).reshape(tuple(shape))


def lay_out(y: Tensor, layout: int) -> Tensor:
    """Return y [B, C, H, W] with the strides of a layout: contiguous, channels or batch last."""
    batch, channels, height, width = y.shape
    if layout == BATCH_LAST:
        out = y.new_empty(channels, height, width, batch).permute(3, 0, 1, 2)
        return out.copy_(y)
    if layout == CHANNELS_LAST:
        return y.new_empty(batch, height, width, channels).permute(0, 3, 1, 2).copy_(y)
    return y.contiguous()


def unstructured_conv2d(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    segments: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    tile: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    pool: int,
    layout: int,
) -> Tensor:
    """Return pool(act(conv2d(x, W) + bias)) for W in the tiles of formats.UnstructuredKernels.

    x [B, C, H, W]; pool p is a p x p max pool of stride p, ragged edges dropped (p = 1: none).
    Zeros of W are multiplied as in a dense layer: inf and NaN of x spread through them.
    """
    weight = scatter_kernels(values, columns, segments, offsets, shape, tile)
    y = conv2d(x, weight, bias, stride, padding, dilation, groups)
    if relu:
        y = y.relu()
    return lay_out(max_pool2d(y, pool) if pool > 1 else y, layout)


def unstructured_conv2d_grad_x(
    grad: Tensor,
    values: Tensor,
    columns: Tensor,
    segments: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    tile: Sequence[int],
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the gradient of unstructured_conv2d (bias, activation, pool apart) to x: x_shape."""
    if grad.numel() == 0:
        return grad.new_zeros(tuple(x_shape))
    weight = scatter_kernels(values, columns, segments, offsets, shape, tile)
    out = conv2d_input(tuple(x_shape), weight, grad, stride, padding, dilation, groups)
    return out.contiguous()


def unstructured_conv2d_grad_values(
    grad: Tensor,
    x: Tensor,
    columns: Tensor,
    segments: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    tile: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the gradient of unstructured_conv2d (activation and pool apart) to values."""
    if grad.numel() == 0:
        return grad.new_zeros(columns.shape[0])
    dense = conv2d_weight(x, tuple(shape), grad, stride, padding, dilation, groups)
    return dense.reshape(-1)[kernel_coordinates(columns, segments, offsets, shape, tile)]
