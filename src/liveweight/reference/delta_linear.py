"""Linear layers in the Delta format, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liveweight.formats.delta import entries_of
from liveweight.reference.activation import apply_activation
from liveweight.reference.parts import batches


def delta_linear(
    x: Tensor,
    values: Tensor,
    deltas: Tensor,
    starts: Tensor,
    order: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    layout: Sequence[int],
    bias: Tensor | None,
    activation: int,
) -> Tensor:
    """Return act(x W^T + bias) [M, N] for x [M, K] and W [N, K] as formats.Delta stores it.

    y[m, n] = act(bias[n] + sum of W[n, k] x[m, k] over the kept (n, k)). Fillers are no weights:
    inf and NaN of x reach no output through them. Sums run in fp32 where x is narrower.
    """
    index = (deltas, starts, order, offsets)
    entry, rows, places = entries_of(values, *index, tuple(shape), tuple(layout))
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(x.shape[0], shape[0], dtype=wide)
    kept = values[entry].to(wide)
    for start, length in batches(x.shape[0], entry.numel()):
        part = x.narrow(0, start, length).to(wide)
        out.narrow(0, start, length).index_add_(1, rows, part[:, places] * kept)
    if bias is not None:
        out += bias.to(wide)
    return apply_activation(out, activation).to(x.dtype)


def delta_to_dense(
    values: Tensor,
    deltas: Tensor,
    starts: Tensor,
    order: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    layout: Sequence[int],
) -> Tensor:
    """Return W [N, K] as formats.Delta stores it, zeros where nothing is kept."""
    index = (deltas, starts, order, offsets)
    entry, rows, places = entries_of(values, *index, tuple(shape), tuple(layout))
    return values.new_zeros(tuple(shape)).index_put((rows, places), values[entry])


def delta_linear_grad_values(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    deltas: Tensor,
    starts: Tensor,
    order: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    layout: Sequence[int],
) -> Tensor:
    """Return sum over m of grad[m, n] x[m, k] for each kept (n, k), 0 for fillers: like values."""
    index = (deltas, starts, order, offsets)
    entry, rows, places = entries_of(values, *index, tuple(shape), tuple(layout))
    wide = torch.promote_types(x.dtype, torch.float32)
    out = values.new_zeros(entry.numel(), dtype=wide)
    for start, length in batches(x.shape[0], entry.numel()):
        part, g = x.narrow(0, start, length).to(wide), grad.narrow(0, start, length).to(wide)
        out += (g[:, rows] * part[:, places]).sum(0)
    return torch.zeros_like(values).index_put((entry,), out.to(values.dtype))
