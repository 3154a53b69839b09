"""BatchNorm in eval mode as part of the layer before it: y = scale * (W x + b - mean) + shift."""

from __future__ import annotations

import torch
from torch import nn

from liveweight.compress import edit, swap
from liveweight.nn.sparse_module import read_dense

_SIZES = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: ("in_channels", "out_channels"),
}


def why_not_folded(norm: nn.Module, tied: set[int]) -> str:
    """Say why a BatchNorm cannot become part of the layer before it; "" where it can."""
    if norm.training:
        return "it is in training mode (call model.eval() first)"
    if norm.running_mean is None:
        return "it keeps no running statistics"
    return edit.why_not_plain(norm, tied)


@torch.no_grad()
def fold_norm(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Return a Linear or Conv2d that computes norm(layer(x)), with float64 arithmetic inside.

    s = gamma / sqrt(var + eps)     W' = s W     b' = beta + s (b - mean)
    """
    weight, bias = read_dense(layer, "weight"), read_dense(layer, "bias")
    gamma = read_dense(norm, "weight")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean
    shift = shift * scale
    if gamma is not None:
        shift = shift + read_dense(norm, "bias").double()
    weight64 = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    sizes = {name: getattr(layer, name) for name in _SIZES[type(layer)]}
    folded = swap.dense_like(layer, sizes, weight64.to(weight.dtype), shift.to(weight.dtype))
    return folded.train(layer.training)
