"""Convolutions with blocks of filters x channels missing, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from liveweight.reference.kernelwise_conv2d import conv2d_size
from liveweight.reference.layouts import CHANNELS_LAST, lay_out
from liveweight.reference.parts import batches, row_of


def block_conv2d(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    schedule: Tensor,
    shape: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """Return act(conv2d(x, W) + bias) [B, Cout, H', W'], channels last, for W as kept blocks.

    x [B, C, H, W], values [kept, kh * kw, bc, bo]; row r of blocks makes the outputs r * bo and on
    and owns the blocks row_offsets[r] to row_offsets[r + 1]; block b reads the channels
    columns[b] * bc and on of the row's group. Only kept blocks are multiplied. Sums run in fp32
    where x is narrower. The schedule is for kernels.
    """
    kept, taps, _, bo = values.shape
    rows = row_of(row_offsets, kept)
    sources = _sources(rows, columns, values.shape, shape, groups)
    size = conv2d_size(x.shape[2:], shape[2:], stride, padding, dilation)
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = _cut_input(x.to(wide), values.shape[2], groups, padding)
    out = parts.new_zeros(x.shape[0], -(-shape[0] // bo), bo, size[0] * size[1])
    for start, length in batches(x.shape[0], kept * max(values.shape[2:]) * out.shape[3]):
        for tap in range(taps):
            seen = _seen(parts.narrow(0, start, length), tap, shape[3], size, stride, dilation)
            products = _product(values[:, tap].to(wide).mT, seen[:, sources].flatten(3))
            out.narrow(0, start, length).index_add_(1, rows, products)
    y = out.flatten(1, 2)[:, : shape[0]].unflatten(2, size)
    if bias is not None:
        y = y + bias[:, None, None].to(wide)
    return lay_out((y.relu() if relu else y).to(x.dtype), CHANNELS_LAST)


def block_conv2d_grad_x(
    grad: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    schedule: Tensor,
    shape: Sequence[int],
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the gradient of block_conv2d (bias and activation apart) to x: x_shape, channels last.

    Every kept block sends values^T grad back to each place that its taps have seen.
    """
    kept, taps, bc, bo = values.shape
    rows = row_of(row_offsets, kept)
    sources = _sources(rows, columns, values.shape, shape, groups)
    size, wide = tuple(grad.shape[2:]), torch.promote_types(grad.dtype, torch.float32)
    grads = _cut_grad(grad.to(wide), bo)
    batch, _, height, width = x_shape
    pieces = groups * -(-shape[1] // bc)
    padded = (height + 2 * padding[0], width + 2 * padding[1])
    out = grads.new_zeros(batch, pieces, bc, *padded)
    for start, length in batches(batch, kept * max(bc, bo) * grads.shape[3]):
        for tap in range(taps):
            products = _product(values[:, tap].to(wide), grads.narrow(0, start, length)[:, rows])
            sums = products.new_zeros(length, pieces, *products.shape[2:])
            sums.index_add_(1, sources, products)
            seen = _seen(out.narrow(0, start, length), tap, shape[3], size, stride, dilation)
            seen += sums.unflatten(3, size)
    out = out[..., padding[0] :, padding[1] :][..., :height, :width]
    out = out.reshape(batch, groups, pieces // groups * bc, height, width)[:, :, : shape[1]]
    out = out.reshape(batch, groups * shape[1], height, width)
    return lay_out(out.to(grad.dtype), CHANNELS_LAST)


def block_conv2d_grad_values(
    grad: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    schedule: Tensor,
    shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the gradient of block_conv2d (activation apart) to values of blocks (bo, bc).

    Entry [b, t, c, o] is the sum over samples and outputs p of grad[r * bo + o, p] times what tap t
    at p sees of channel columns[b] * bc + c, for b in row r; zero in the padding of blocks.
    """
    bo, bc = block
    kept, taps = columns.numel(), shape[2] * shape[3]
    rows = row_of(row_offsets, kept)
    sources = _sources(rows, columns, (kept, taps, bc, bo), shape, groups)
    size, wide = tuple(grad.shape[2:]), torch.promote_types(x.dtype, torch.float32)
    grads, parts = _cut_grad(grad.to(wide), bo), _cut_input(x.to(wide), bc, groups, padding)
    out = parts.new_zeros(kept, taps, bc, bo)
    for start, length in batches(x.shape[0], kept * max(bc, bo) * grads.shape[3]):
        right = grads.narrow(0, start, length)[:, rows].mT
        for tap in range(taps):
            seen = _seen(parts.narrow(0, start, length), tap, shape[3], size, stride, dilation)
            out[:, tap] += _product(seen[:, sources].flatten(3), right).sum(0)
    return out.to(x.dtype)


def _sources(rows, columns, sizes, shape, groups) -> Tensor:
    """Return the piece of channels, counted over all groups, that each kept block reads."""
    per_group = shape[0] // groups
    return rows * sizes[3] // max(per_group, 1) * -(-shape[1] // sizes[2]) + columns.long()


def _cut_input(x: Tensor, bc: int, groups: int, padding: Sequence[int]) -> Tensor:
    """Return x [B, C, H, W] padded with zeros, as [B, groups * width, bc, H + .., W + ..]."""
    batch, channels, *size = x.shape
    per_group = channels // groups
    more = (padding[1], padding[1], padding[0], padding[0], 0, -per_group % bc)
    x = functional.pad(x.reshape(batch, groups, per_group, *size), more)
    return x.reshape(batch, groups * -(-per_group // bc), bc, *x.shape[3:])


def _cut_grad(grad: Tensor, bo: int) -> Tensor:
    """Return grad [B, Cout, H', W'], padded with zeros, as [B, rows, bo, H' * W']."""
    batch, filters, height, width = grad.shape
    flat = grad.reshape(batch, filters, height * width)
    padded = functional.pad(flat, (0, 0, 0, -filters % bo))
    return padded.reshape(batch, -(-filters // bo), bo, height * width)


def _seen(x: Tensor, tap: int, kw: int, size, stride, dilation) -> Tensor:
    """Return the view [..., H', W'] of padded x [..., H, W] that one tap sees."""
    first = (tap // kw * dilation[0], tap % kw * dilation[1])
    last = [f + (n - 1) * d + 1 for f, n, d in zip(first, size, stride, strict=True)]
    return x[..., first[0] : last[0] : stride[0], first[1] : last[1] : stride[1]]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right in their dtype, under autocast as well."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right
