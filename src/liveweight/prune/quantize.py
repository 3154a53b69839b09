"""Post-training quantization of weights: what pruning is compared with at equal bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liveweight.prune.selectors import Selector, choose_layers

_SHRINKS = 80  # scales tried per unit
_SCALE_BYTES = 2  # one half-precision scale per unit


@dataclass(frozen=True)
class QuantizedRow:
    """What quantization did to one layer.

    bytes   of its weights: bits per weight, packed, and a half-precision scale per unit
    error   relative error of the weight, |W - Q| / |W| in the Frobenius norm
    """

    name: str
    bits: int
    weights: int
    bytes: int
    error: float


def quantize_weights_(
    model: nn.Module,
    bits: int,
    *,
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
) -> list[QuantizedRow]:
    """Round the weights of Linear and Conv2d layers to `bits` bits, in place, without data.

        q_k = scale_j round(clamp(w_k / scale_j, -m, m)),   m = 2^(bits - 1) - 1

    Symmetric and uniform, one scale per output unit j: of 80 scales between 1/80 and all of
    max |w_j| / m, the one of the least squared error. Zeros stay zeros. Biases stay as they are.
    Values are rounded numbers in the dtype that they had: a study of accuracy, not of speed.

    bits     2 to 8
    returns  a row per layer
    Raises ValueError for other bits and for selectors that match nothing; TypeError for a model
    that is no module.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be a whole number from 2 to 8, got {bits!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    chosen, _, _ = choose_layers(model, layers, ignore)
    rows = []
    with torch.no_grad():
        for name, module in chosen.items():
            weight = module.weight
            rounded = round_rows(weight.detach().double().flatten(1), bits).view_as(weight)
            norm = float(weight.double().norm())
            error = float((weight.double() - rounded).norm()) / norm if norm else 0.0
            weight.copy_(rounded)
            size = -(-weight.numel() * bits // 8) + _SCALE_BYTES * weight.shape[0]
            rows.append(QuantizedRow(name, bits, weight.numel(), size, error))
    return rows


def round_rows(rows: Tensor, bits: int) -> Tensor:
    """Return rows [out, n] rounded to 2^bits - 1 levels each, by the scale of the least error."""
    most = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    best = torch.zeros_like(rows)
    least = torch.full_like(largest, float("inf"))
    for step in range(_SHRINKS, 0, -1):
        scale = largest * step / _SHRINKS / most
        tried = (rows / scale).clamp(-most, most).round() * scale
        error = (rows - tried).square().sum(1, keepdim=True)
        better = error < least
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best
