"""signal_mask: the connections of a linear layer that carry a given share of each unit's signal."""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight import _library, reference
from liveweight._check import check_bias, check_fraction, check_tensor
from liveweight.ops.mass_mask import TIES, fake_mask

_OP = "signal_mask"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def signal_mask(
    weight: Tensor,
    activity: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: float,
    ties: str = "stable",
    packed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Keep, per unit, the fewest connections that carry >= alpha of its signal.

        s_ij = |w_ij| a_j, and |b_i| as one more connection; then the rule of mass_mask

    weight    [N, K]  float32, bfloat16 or float16
    activity  [K]     float32, finite and >= 0: mean |x_j|, of activity_stats_
    bias      [N]     like weight, or None
    alpha, ties, packed   as for mass_mask
    returns   the mask of weight, bool [N, K] or bits [N, ceil(K / 32)] int32, and that of bias,
              bool [N], or None without one

    The products are float32 and, on CUDA, never stored: one read of weight. Raises TypeError
    (types, dtypes) and ValueError (shapes, devices, alpha, ties; a product that is negative, NaN
    or infinite: names the row, in a captured CUDA graph a device-side assertion).
    Source: the scores of NNrelief (arXiv 2109.10795) for linear layers, without the division by
    their sum, which changes no mask but by its rounding.
    """
    check_tensor(_OP, "weight", weight, dim=2, dtypes=_DTYPES)
    check_tensor(_OP, "activity", activity, dim=1, dtypes=(torch.float32,), device=weight.device)
    if activity.shape[0] != weight.shape[1]:
        raise ValueError(
            f"{_OP}: expected activity [{weight.shape[1]}] for weight {tuple(weight.shape)}, "
            f"got {tuple(activity.shape)}"
        )
    if bias is not None:
        check_bias(_OP, bias, weight.shape[0], weight)
        bias = bias.detach().contiguous()
    alpha = check_fraction(f"{_OP}: alpha", alpha)
    if ties not in TIES:
        raise ValueError(f'{_OP}: ties must be "stable" or "authors", got {ties!r}')
    weight, activity = weight.detach().contiguous(), activity.detach().contiguous()
    mask, of_bias = _op(weight, activity, bias, alpha, ties == "authors", packed)
    return mask, None if bias is None else of_bias


def _compose(
    weight: Tensor,
    activity: Tensor,
    bias: Tensor | None,
    alpha: float,
    authors_ties: bool,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """The reference with the mass_mask of the device."""
    scores = reference.signals(weight, activity, bias)
    try:
        keep = torch.ops.liveweight.mass_mask(scores, alpha, authors_ties)
    except ValueError as error:
        raise ValueError(reference.refused_signals(error)) from None
    return reference.split_signals(keep, weight.shape[1], packed)


def _fake(
    weight: Tensor,
    activity: Tensor,
    bias: Tensor | None,
    alpha: float,
    authors_ties: bool,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    of_bias = weight.new_empty(0 if bias is None else weight.shape[0], dtype=torch.bool)
    return fake_mask(weight, packed), of_bias


_library.register(_OP, _compose, _fake)
_op = torch.ops.liveweight.signal_mask.default
