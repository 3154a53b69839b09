"""Wanda and RIA: magnitude times the norm of what a weight reads."""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight.prune.activity import Activity, Observer
from liveweight.prune.importances import LayerScore, Target, importances, score_dtype
from liveweight.prune.kernel_response import patches
from liveweight.prune.structure import by_target


def input_norms(target: Target, seen: Activity) -> Tensor:
    """Return the root mean square over samples of what every weight of one unit reads: float64.

    [in] of a Linear; [groups, in / groups, r, s] of a convolution, summed over output positions
    before the root, so that borders count as often as they are read.
    """
    if target.kind == "linear":
        return seen.mean_square.sqrt()
    columns = patches(target.module, seen.mean_square.unsqueeze(0))[0]  # [C, r*s, P]
    reach = columns.sum(-1).sqrt().unflatten(-1, target.module.kernel_size)
    return reach.unflatten(0, (target.module.groups, -1))


def _times_norms(target: Target, size: Tensor, norms: Tensor) -> Tensor:
    """Multiply [out, in / groups, ...] by norms as input_norms returns them."""
    if target.kind == "linear":
        return size * norms
    by_group = size.unflatten(0, (target.module.groups, -1))  # [g, out/g, in/g, r, s]
    return (by_group * norms.unsqueeze(1)).flatten(0, 1)


class Wanda:
    """Score |w_ij| ||x_j||, the norm over all samples (and output positions) of the input.

    The norm is a root mean square, which no ranking inside a layer tells from the root of the
    sum. A kernel scores the sum of its weights' scores. Biases do not compete. The source compares
    inside each row of a Linear: alpha does so here too, sparsity compares inside the layer.

    Source: Sun, Liu, Bair, Kolter, "A simple and effective pruning approach for large language
    models", arXiv 2306.11695.
    """

    name = "wanda"
    needs_data = True
    cost = "one forward pass, one read of each layer's input"

    def default_granularity(self, kind: str) -> str:
        return "weight"

    def observer(self, target: Target) -> Observer:
        return Activity(target.kind)

    def score(self, target: Target, seen: Activity) -> LayerScore:
        weight = target.module.weight.detach()
        scores = _times_norms(target, weight.double().abs(), input_norms(target, seen))
        return LayerScore(by_target(scores.to(score_dtype(weight)), target))


class Ria:
    """Score a weight relative to its row and its column, times a root of what it reads.

        s_ij = (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) ||x_j||^a

    Of a convolution, a row is a filter and a column is one position of one input channel's kernels
    (of the same group). An all-zero row or column adds nothing.

    a   power of the input's norm; 0 needs the data all the same and ignores it

    Source: Zhang, Bai, Lin, Zhao, Hou, Cannistraci, "Plug-and-play: an efficient post-training
    pruning method for large language models", ICLR 2024, and its authors' program.
    Raises ValueError for a negative a.
    """

    name = "ria"
    needs_data = True
    cost = Wanda.cost

    def __init__(self, a: float = 0.5) -> None:
        if not 0 <= a < float("inf"):
            raise ValueError(f"ria: a must be finite and >= 0, got {a}")
        self.a = float(a)

    def default_granularity(self, kind: str) -> str:
        return "weight"

    def observer(self, target: Target) -> Observer:
        return Activity(target.kind)

    def score(self, target: Target, seen: Activity) -> LayerScore:
        weight = target.module.weight.detach()
        size = weight.double().abs()
        groups = getattr(target.module, "groups", 1)
        by_group = size.unflatten(0, (groups, -1))
        columns = by_group.sum(1, keepdim=True)
        rows = by_group.flatten(2).sum(2).view(*by_group.shape[:2], *[1] * (by_group.dim() - 2))
        relative = _share(by_group, columns) + _share(by_group, rows)
        norms = input_norms(target, seen).pow(self.a)
        scores = _times_norms(target, relative.flatten(0, 1), norms)
        return LayerScore(by_target(scores.to(score_dtype(weight)), target))


def _share(part: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, part / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)


importances["wanda"] = Wanda
importances["ria"] = Ria
