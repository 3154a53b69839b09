"""Every op in plain PyTorch: the truth for tests, and the kernel where no compiled one exists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d
from torch.nn.grad import conv2d_input, conv2d_weight

# A gather of at most this many numbers at once: 64 MB of float32.
_CHUNK = 1 << 24


def _row_of(row_offsets: Tensor, kept: int) -> Tensor:
    """Return the row of each kept entry: int64 [kept]."""
    rows = torch.arange(row_offsets.numel() - 1, device=row_offsets.device)
    counts = (row_offsets[1:] - row_offsets[:-1]).long()
    return torch.repeat_interleave(rows, counts, output_size=kept)


def _batches(total: int, cost: int) -> list[tuple[int, int]]:
    """Return (start, length) of parts of total items; an item costs `cost` numbers."""
    step = max(1, _CHUNK // max(cost, 1))
    return [(start, min(step, total - start)) for start in range(0, total, step)]


def activity_stats_(stats: Tensor, x: Tensor, eps: float) -> None:
    """Add sum |x|, sum x^2 and count(|x| > eps) of x [N, F, P] to stats [4, F], all in float64.

    The last row becomes the larger of itself and max |x|.
    """
    size = x.detach().double().abs()  # [N, F, P]
    stats[0] += size.sum((0, 2))
    stats[1] += size.square().sum((0, 2))
    stats[2] += (size > eps).sum((0, 2))
    if x.numel() > 0:
        stats[3] = torch.maximum(stats[3], size.amax((0, 2)))


def mass_mask(scores: Tensor, alpha: float, authors_ties: bool) -> Tensor:
    """Keep per row of scores [R, n] the smallest set that sums to >= alpha of the row's total."""
    R, n = scores.shape
    bad = ~((scores >= 0) & torch.isfinite(scores)).all(1)  # [R]
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"mass_mask: scores must be finite and >= 0, row {row} holds a negative, NaN or "
            "infinite one"
        )
    if scores.numel() == 0:
        return torch.zeros(R, n, dtype=torch.bool, device=scores.device)
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    mass = ranked.double().cumsum(1)  # [R, n]
    total = mass[:, -1:]
    if authors_ties:  # sums are compared in float32; the first dropped score and its ties go
        kept = (mass.float() < alpha * total.float()).sum(1, keepdim=True) + 1
        return scores > ranked.gather(1, kept.clamp(max=n - 1))
    positive = (ranked > 0).sum(1, keepdim=True)  # [R, 1]
    kept = ((mass < alpha * total).sum(1, keepdim=True) + 1).minimum(positive)
    if alpha == 1:
        kept = positive
    if alpha == 0:
        kept = kept * 0
    keep = torch.arange(n, device=scores.device) < kept  # [R, n], in descending order
    return torch.zeros_like(keep).scatter_(1, order, keep)


def unstructured_linear(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """Return act(x W^T + bias) [M, N] for x [M, K] and W [N, K] in compressed sparse rows.

    y[m, n] = act(bias[n] + sum of values[i] x[m, columns[i]] over the entries i of row n).
    Only kept entries are multiplied: inf and NaN of x reach no output through a removed weight.
    """
    columns, rows = columns.long(), _row_of(row_offsets, columns.numel())
    out = x.new_zeros(x.shape[0], row_offsets.numel() - 1)
    for start, length in _batches(x.shape[0], columns.numel()):
        part = x.narrow(0, start, length)
        out.narrow(0, start, length).index_add_(1, rows, part[:, columns] * values)
    if bias is not None:
        out += bias
    return out.relu_() if relu else out


def unstructured_linear_grad_x(
    grad: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, in_features: int
) -> Tensor:
    """Return grad W [M, K] for grad [M, N]: the gradient of unstructured_linear to x."""
    columns, rows = columns.long(), _row_of(row_offsets, columns.numel())
    out = grad.new_zeros(grad.shape[0], in_features)
    for start, length in _batches(grad.shape[0], columns.numel()):
        part = grad.narrow(0, start, length)
        out.narrow(0, start, length).index_add_(1, columns, part[:, rows] * values)
    return out


def unstructured_linear_grad_values(
    grad: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor
) -> Tensor:
    """Return sum over m of grad[m, n] x[m, columns[i]] for each kept entry i of row n: [nnz]."""
    columns, rows = columns.long(), _row_of(row_offsets, columns.numel())
    out = x.new_zeros(columns.numel())
    for start, length in _batches(x.shape[0], columns.numel()):
        part, g = x.narrow(0, start, length), grad.narrow(0, start, length)
        out += (g[:, rows] * part[:, columns]).sum(0)
    return out


def _input_channels(filters: Tensor, channels: Tensor, sizes: tuple[int, int, int]) -> Tensor:
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
) -> Tensor:
    """Return pool(act(conv2d(x, W) + bias)) for W given by its kept kernels.

    x [B, C, H, W], values [kept, kh, kw]; filter o owns the kernels filter_offsets[o] to
    filter_offsets[o + 1], kernel i reads channel channels[i] of the filter's group. pool p is a
    p x p max pool of stride p, ragged edges dropped (p = 1: none). Only kept kernels are
    multiplied: inf and NaN of x reach no output through a removed kernel.
    """
    kept, kernel_size = channels.numel(), values.shape[1:]
    filters, count = _row_of(filter_offsets, kept), filter_offsets.numel() - 1
    source = _input_channels(filters, channels, (count, x.shape[1], groups))
    height, width = conv2d_size(x.shape[2:], kernel_size, stride, padding, dilation)
    out = x.new_zeros(x.shape[0], count, height, width)
    if kept:
        for start, length in _batches(x.shape[0], kept * max(x[0, 0].numel(), height * width)):
            part = x.narrow(0, start, length)[:, source]
            part = conv2d(part, values[:, None], None, stride, padding, dilation, kept)
            out.narrow(0, start, length).index_add_(1, filters, part)
    if bias is not None:
        out += bias[:, None, None]
    if relu:
        out.relu_()
    return max_pool2d(out, pool) if pool > 1 else out


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
    filters = _row_of(filter_offsets, kept)
    source = _input_channels(filters, channels, (grad.shape[1], x_shape[1], groups))
    out = grad.new_zeros(tuple(x_shape))
    if kept == 0 or grad.numel() == 0:
        return out
    for start, length in _batches(x_shape[0], kept * x_shape[2] * x_shape[3]):
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
    filters = _row_of(filter_offsets, kept)
    source = _input_channels(filters, channels, (grad.shape[1], x.shape[1], groups))
    shape = (kept, 1, *kernel_size)
    out = x.new_zeros(kept, *kernel_size)
    if kept == 0 or grad.numel() == 0:
        return out
    for start, length in _batches(x.shape[0], kept * x[0, 0].numel()):
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


def unpack_mask_bits(bits: Tensor, K: int) -> Tensor:
    """Return the mask [N, K] bool of bits [N, ceil(K / 32)] int32, bit k % 32 of word k // 32."""
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    mask = (bits[:, :, None] >> places) & 1  # [N, ceil(K / 32), 32]
    return mask.reshape(bits.shape[0], 32 * bits.shape[1])[:, :K].bool()


def masked_linear(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (W o M)^T + bias [M, N] for x [M, K], W [N, K] and M from mask_bits.

    Sums run in float32 (float64 for float64) and are rounded once, to the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = weight.masked_fill(~unpack_mask_bits(mask_bits, weight.shape[1]), 0).to(wide)
    y = x.to(wide) @ kept.t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
