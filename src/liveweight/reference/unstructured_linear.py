"""Linear layers with single weights missing, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liveweight.formats.unstructured import tile_places
from liveweight.reference.activation import apply_activation
from liveweight.reference.parts import batches


def unstructured_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    segments: Tensor,
    offsets: Tensor,
    bits: Tensor,
    tile: Sequence[int],
    out_features: int,
    bias: Tensor | None,
    activation: int,
    batch_last: bool,
) -> Tensor:
    """Return act(x W^T + bias) [M, N] for x [M, K] and W [N, K] in tiles (formats.Unstructured).

    y[m, n] = act(bias[n] + sum of values[i] x[m, k] over the entries i = (n, k)). Only kept entries
    are multiplied: inf and NaN of x reach no output through a removed weight. With batch_last the
    transpose of y is contiguous. Sums run in fp32 where x is narrower. bits repeat columns
    and are not read.
    """
    rows, places = tile_places(columns, segments, offsets, tile, x.shape[1])
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(x.shape[0], out_features, dtype=wide)
    for start, length in batches(x.shape[0], columns.numel()):
        part = x.narrow(0, start, length).to(wide)
        out.narrow(0, start, length).index_add_(1, rows, part[:, places] * values.to(wide))
    if bias is not None:
        out += bias.to(wide)
    out = apply_activation(out, activation).to(x.dtype)
    return out.t().contiguous().t() if batch_last else out


def unstructured_linear_grad_x(
    grad: Tensor,
    values: Tensor,
    columns: Tensor,
    segments: Tensor,
    offsets: Tensor,
    tile: Sequence[int],
    in_features: int,
) -> Tensor:
    """Return grad W [M, K] for grad [M, N]: the gradient of unstructured_linear to x."""
    rows, places = tile_places(columns, segments, offsets, tile, in_features)
    out = grad.new_zeros(grad.shape[0], in_features)
    for start, length in batches(grad.shape[0], columns.numel()):
        part = grad.narrow(0, start, length)
        out.narrow(0, start, length).index_add_(1, places, part[:, rows] * values)
    return out


def unstructured_linear_grad_values(
    grad: Tensor,
    x: Tensor,
    columns: Tensor,
    segments: Tensor,
    offsets: Tensor,
    tile: Sequence[int],
) -> Tensor:
    """Return sum over m of grad[m, n] x[m, k] for each kept entry i = (n, k): [nnz]."""
    rows, places = tile_places(columns, segments, offsets, tile, x.shape[1])
    out = x.new_zeros(columns.numel())
    for start, length in batches(x.shape[0], columns.numel()):
        part, g = x.narrow(0, start, length), grad.narrow(0, start, length)
        out += (g[:, rows] * part[:, places]).sum(0)
    return out
