"""Activity statistics and cumulative-mass selection in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight.reference.masked_linear import pack_mask_bits


def activity_stats_(stats: Tensor, x: Tensor, eps: float, channels: int = 0) -> None:
    """Add sum |x|, sum x^2 and count(|x| > eps) of x [N, F, P] to stats [4, F], all in float64.

    The last row becomes the larger of itself and max |x|. channels > 0: the features of x are
    [positions, channels], those of stats [channels, positions].
    """
    size = x.detach().double().abs()  # [N, F, P]
    if channels > 0:
        size = size.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1, 2)
    stats[0] += size.sum((0, 2))
    stats[1] += size.square().sum((0, 2))
    stats[2] += (size > eps).sum((0, 2))
    if x.numel() > 0:
        stats[3] = torch.maximum(stats[3], size.amax((0, 2)))


def mass_mask(scores: Tensor, alpha: float, authors_ties: bool, packed: bool = False) -> Tensor:
    """Keep per row of scores [R, n] the smallest set that sums to >= alpha of the row's total.

    bool [R, n], or where packed its bits as pack_mask_bits lays them out.
    """
    mask = _mass_mask(scores, alpha, authors_ties)
    return pack_mask_bits(mask) if packed else mask


def _mass_mask(scores: Tensor, alpha: float, authors_ties: bool) -> Tensor:
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


def signal_mask(
    weight: Tensor,
    activity: Tensor,
    bias: Tensor | None,
    alpha: float,
    authors_ties: bool,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """Return what mass_mask keeps of |weight| * activity [N, K], |bias| as one more entry of a row.

    The products are float32. Returns the mask of weight, bool [N, K] or its bits where packed, and
    that of bias, bool [N], or [0] without one.
    """
    try:
        keep = mass_mask(signals(weight, activity, bias), alpha, authors_ties)
    except ValueError as error:
        raise ValueError(refused_signals(error)) from None
    return split_signals(keep, weight.shape[1], packed)


def signals(weight: Tensor, activity: Tensor, bias: Tensor | None) -> Tensor:
    """Return |weight| * activity, with |bias| as the last column, float32 [N, K or K + 1]."""
    scores = weight.float().abs() * activity
    return scores if bias is None else torch.cat([scores, bias.float().abs()[:, None]], 1)


def refused_signals(error: ValueError) -> str:
    """Return what mass_mask says against a score as signal_mask says it."""
    return str(error).replace("mass_mask: scores", "signal_mask: |weight| * activity")


def split_signals(keep: Tensor, inputs: int, packed: bool) -> tuple[Tensor, Tensor]:
    """Return the masks of weight and bias from that of `signals`."""
    mask, of_bias = keep[:, :inputs].contiguous(), keep[:, inputs:]
    of_bias = of_bias.flatten() if keep.shape[1] > inputs else keep.new_zeros(0)
    return (pack_mask_bits(mask) if packed else mask), of_bias.contiguous()


def top_k_mask(scores: Tensor, k: int, per_row: bool, sizes: Tensor | None, packed: bool) -> Tensor:
    """Keep the largest of scores [R, n], equal ones by lower index: k per row, or of all together.

    With sizes int64 [R, n] (not per row) the largest whose sizes add up to at most k, and none of a
    size <= 0. bool [R, n], or where packed its bits as pack_mask_bits lays them out.
    """
    bad = scores.isnan().any(1)  # [R]
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"top_k_mask: scores must not be NaN, row {row} holds one")
    rows = scores if per_row else scores.reshape(1, -1)
    keep = torch.zeros(rows.shape, dtype=torch.bool, device=scores.device)
    if sizes is None:
        order = rows.sort(dim=1, descending=True, stable=True).indices[:, :k]
        keep.scatter_(1, order, True)
    else:
        there = (sizes.reshape(-1) > 0).nonzero()[:, 0]
        order = there[rows[0, there].sort(descending=True, stable=True).indices]
        keep[0, order[sizes.reshape(-1)[order].cumsum(0) <= k]] = True
    keep = keep.view(scores.shape)
    return pack_mask_bits(keep) if packed else keep
