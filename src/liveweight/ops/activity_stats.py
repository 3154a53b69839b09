"""activity_stats_: running statistics of |x| per feature, per channel or per map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liveweight import _library, reference
from liveweight._check import check_tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OP = "activity_stats_"


def new_activity_stats(features: int, device: torch.device | str | None = None) -> Tensor:
    """Return empty statistics for `features` features: float64 zeros [4, features].

    Raises ValueError for a negative number.
    """
    if features < 0:
        raise ValueError(f"new_activity_stats: features must be >= 0, got {features}")
    return torch.zeros(4, features, dtype=torch.float64, device=device)


# Each returns x as [N, F, P], and the channels where F is [positions, channels] instead of the
# [channels, positions] of stats, else 0.
def _by_feature(x: Tensor) -> tuple[Tensor, int]:
    if x.dim() < 1:
        raise ValueError(f'{_OP}: x must have a feature dimension for per="feature", got a scalar')
    return x.reshape(x.shape[:-1].numel(), x.shape[-1], 1), 0


def _by_channel(x: Tensor) -> tuple[Tensor, int]:
    if x.dim() < 2:
        raise ValueError(f'{_OP}: x must be [N, C, ...] for per="channel", got {tuple(x.shape)}')
    last = x.movedim(1, -1)
    if last.is_contiguous():  # channels last, or no positions: read down the columns, no copy
        return last.reshape(last.shape[:-1].numel(), x.shape[1], 1), 0
    return x.reshape(x.shape[0], x.shape[1], x.shape[2:].numel()), 0


def _by_map(x: Tensor) -> tuple[Tensor, int]:
    if x.dim() < 2:
        raise ValueError(f'{_OP}: x must be [N, ...] for per="map", got {tuple(x.shape)}')
    features = x.shape[1:].numel()
    if x.dim() > 2 and features and not x.is_contiguous():
        last = x.movedim(1, -1)
        if last.is_contiguous():  # channels last: read in place, the statistics are turned
            return last.reshape(x.shape[0], features, 1), x.shape[1]
    return x.reshape(x.shape[0], features, 1), 0


_VIEWS = {"feature": _by_feature, "channel": _by_channel, "map": _by_map}


def add_activity(stats: Tensor, x: Tensor, per: str, eps: float) -> None:
    """Do what activity_stats_ does without its checks: observers call it for every batch.

    stats [4, F] of x's device, as new_activity_stats made it; x [..., F] and so on of a dtype that
    activity_stats_ takes, without gradient. The compiled kernels still guard their memory.
    """
    view, channels = _VIEWS[per](x)  # [N, F, P]
    _activity_stats(stats, view.contiguous(), eps, channels)


def activity_stats_(stats: Tensor, x: Tensor, *, per: str = "feature", eps: float = 0.0) -> Tensor:
    """Add the activity of one batch to running statistics, in one read of x.

        stats[0] += sum |x|    stats[1] += sum x^2    stats[2] += count(|x| > eps)
        stats[3] = max(stats[3], max |x|)

    The sums run over all dimensions but the features'. A NaN in x shows in rows 0, 1 and 3 of its
    feature.

    stats    [4, F]  float64, changed in place (new_activity_stats)
    x        float32, bfloat16 or float16, any strides; sums are fp32 flushed to float64
    per      "feature": x [..., F]; "channel": x [N, F, ...]; "map": x [N, ...], F = all but N
    eps      threshold of an active value, >= 0
    returns  stats

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device, `per` or `eps`.
    Source: row 0 over the number of samples is the mean |x| of NNrelief (arXiv 2109.10795), row 1
    the squared input norm of Wanda (arXiv 2306.11695).
    """
    check_tensor(_OP, "stats", stats, dim=2, dtypes=(torch.float64,))
    check_tensor(_OP, "x", x, dtypes=_DTYPES, device=stats.device)
    if per not in _VIEWS:
        raise ValueError(f'{_OP}: per must be "feature", "channel" or "map", got {per!r}')
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"{_OP}: eps must be finite and >= 0, got {eps}")
    view, channels = _VIEWS[per](x.detach())  # [N, F, P]
    if stats.shape != (4, view.shape[1]):
        raise ValueError(
            f"{_OP}: x of shape {tuple(x.shape)} has {view.shape[1]} features per {per}, so stats "
            f"must be [4, {view.shape[1]}], got {tuple(stats.shape)}"
        )
    if not stats.is_contiguous():
        raise ValueError(f"{_OP}: stats must be contiguous, got strides {stats.stride()}")
    _activity_stats(stats, view.contiguous(), float(eps), channels)
    return stats


def _fake(stats: Tensor, x: Tensor, eps: float, channels: int = 0) -> None:
    return None


_library.register("activity_stats_", reference.activity_stats_, _fake)
_activity_stats = torch.ops.liveweight.activity_stats_.default
