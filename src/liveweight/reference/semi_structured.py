"""Linear layers with two of four weights stored (2:4), in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liveweight.formats import semi_structured
from liveweight.reference.activation import apply_activation
from liveweight.reference.parts import batches


def semi_structured_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    out_features: int,
    bias: Tensor | None,
    activation: int,
    batch_last: bool,
) -> Tensor:
    """Return act(x W^T + bias) [M, N] for x [M, K] and W [N, K] (formats.SemiStructured).

    Only stored entries are multiplied: inf and NaN of x reach no output through another. With
    batch_last the transpose of y is contiguous. Sums run in fp32 where x is narrower.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    codes = semi_structured.read_codes(meta)[:out_features]
    pairs = semi_structured.read_values(values)[:out_features].to(wide)
    first = 4 * torch.arange(codes.shape[1], device=x.device).view(-1, 1)
    places = (semi_structured.columns_of(codes) + first).flatten()
    padded = x.new_zeros(x.shape[0], 4 * codes.shape[1], dtype=wide)
    padded[:, : x.shape[1]] = x
    out = x.new_zeros(x.shape[0], out_features, dtype=wide)
    for start, length in batches(x.shape[0], places.numel()):
        seen = padded.narrow(0, start, length)[:, places].view(length, *pairs.shape)
        out[start : start + length] = (seen * pairs).sum((2, 3))
    if bias is not None:
        out += bias.to(wide)
    out = apply_activation(out, activation).to(x.dtype)
    return out.t().contiguous().t() if batch_last else out


def semi_structured_torch_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    out_features: int,
    bias: Tensor | None,
    activation: int,
    batch_last: bool,
    backend: str,
) -> Tensor:
    """Return what semi_structured_linear does; backend names a library of GPUs, unused here."""
    return semi_structured_linear(x, values, meta, out_features, bias, activation, batch_last)


def semi_structured_pack(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (values, meta, crowded) of a weight [N, K], kept where mask is, or where not zero.

    crowded [1] int32 is not zero where a group of four keeps more than two.
    """
    return semi_structured.pack(weight, mask)


def semi_structured_to_dense(values: Tensor, meta: Tensor, shape: Sequence[int]) -> Tensor:
    """Return W [N, K] of its values and meta (formats.SemiStructured)."""
    return semi_structured.unpack(values, meta, tuple(shape))


def semi_structured_take(dense: Tensor, meta: Tensor) -> Tensor:
    """Return the entries of dense [N, K] at the places of meta, laid out like values."""
    return semi_structured.take(dense, meta)
