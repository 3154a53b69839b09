"""NNrelief: keep, per unit, the connections that carry its activity."""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight._check import near_misses
from liveweight.prune.activity import Activity, Observer
from liveweight.prune.importances import LayerScore, Target, importances, score_dtype
from liveweight.prune.kernel_response import (
    MeanKernelNorms,
    kernel_norms,
    output_positions,
    weight_norms,
)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {allowed}, got {value!r}: {near_misses(value, allowed)}"
        )
    return value


class NNRelief:
    """Score a connection by the mean absolute signal it carries, relative to its unit's total.

    Linear     s_ij = |w_ij| mean_n|x_ni| / S_j,  bias |b_j| / S_j
    conv       s_ij = || |k_ij| * |x_i| || / S_j per 2-D kernel, bias || |b_j| || / S_j, the norm
               over the h x w output map
    S_j        the sum over a unit's connections and its bias

    The bias is one more connection of its unit. mean_n|w x| = |w| mean_n|x| is exact, so a Linear
    needs one number per feature. What a conv takes for |x_i| is the variant's choice:

    variant    "authors": the mean map mean_n|x_n| (norm of the mean; one read of the activations,
               no further cost per sample).  "paper": the mean over samples of the norms. The norm
               of the mean is at most the mean of the norms; the masks of the two agree in 99.4
               to 99.8 % of the entries on random maps (64 samples, alpha 0.95).
    norm       "fro", or "l1" (sum over the output map, what the authors' LeNet program computes;
               the two variants are then the same number)
    ties       "stable": the smallest set that holds alpha of the total, lower index first among
               equals; a unit with one input keeps it.  "authors": literally keep s > the first
               dropped score, so ties with it go, and every unit loses at least one connection.
    cleanup    prune units that nothing reads any more, last layer first

    Under a mass rule (`alpha`) the method also prunes units that are never active after their
    activation, with their BatchNorm entries, and weighs the branch of a residual block against its
    shortcut. Convolutions are scored first, on the weights as they were; Linears then see the
    pruned convolutions. A conv is scored by kernels; granularity "weight" (our extension) takes the
    response of each weight alone. Whole neurons (our extension, too) compare by their load, S_j
    without the bias: a sum of shares of S_j says nothing.

    Source: Dekhovich, Tax, Sluiter, Bessa, "Neural network relief: a pruning algorithm based on
    neural activity", Machine Learning 113, 2024, and the program its authors published.
    Raises ValueError for an unknown variant, norm or ties.
    """

    name = "nnrelief"
    needs_data = True
    cost = "one or two forward passes, one read of each layer's input"
    phases = (("conv",), ("linear",))
    dead_units = True
    residual = True

    def __init__(
        self,
        variant: str = "authors",
        norm: str = "fro",
        ties: str = "stable",
        cleanup: bool = True,
    ) -> None:
        self.variant = _check_choice("variant", variant, ("authors", "paper"))
        self.norm = _check_choice("norm", norm, ("fro", "l1"))
        self.ties = _check_choice("ties", ties, ("stable", "authors"))
        self.cleanup = bool(cleanup)

    def __repr__(self) -> str:
        return (
            f"NNRelief(variant={self.variant!r}, norm={self.norm!r}, ties={self.ties!r}, "
            f"cleanup={self.cleanup})"
        )

    def default_granularity(self, kind: str) -> str:
        return "kernel" if kind == "conv" else "weight"

    def observer(self, target: Target) -> Observer:
        per_sample = self.variant == "paper" and self.norm == "fro"
        if target.kind == "linear" or not per_sample:
            return Activity(target.kind)
        if target.granularity != "kernel":
            raise ValueError(
                f"layer '{target.name}': variant 'paper' scores whole kernels, "
                f"not granularity {target.granularity!r}"
            )
        return MeanKernelNorms(target.module)

    def score(self, target: Target, seen: Observer) -> LayerScore:
        weight = target.module.weight.detach()
        if target.kind == "linear":
            # In place, and not in float64: for a wide Linear this pass over the weights is what
            # scoring costs beside the forward pass.
            scores = weight.abs().to(score_dtype(weight))
            return _relative(target, scores.mul_(seen.mean.to(scores.dtype)), 1.0)
        if isinstance(seen, MeanKernelNorms):
            scores = seen.mean
        else:
            norms = kernel_norms if target.granularity == "kernel" else weight_norms
            scores = norms(target.module, weight, seen.mean, self.norm)
        positions = output_positions(target.module, seen.shape)
        return _relative(target, scores, positions if self.norm == "l1" else positions**0.5)


def _relative(target: Target, scores: Tensor, bias_norm: float) -> LayerScore:
    """Divide by S_j; bias_norm is the norm of an output map of ones. Changes scores in place."""
    total = scores.flatten(1).sum(1).double()
    bias = None
    if target.module.bias is not None:
        bias = target.module.bias.detach().abs().double() * bias_norm
        total = total + bias
    divisor = torch.where(total > 0, total, 1.0)
    dtype = score_dtype(target.module.weight)
    bias = None if bias is None else (bias / divisor).to(dtype)
    scores.div_(divisor.to(scores.dtype).view(-1, *[1] * (scores.dim() - 1)))
    return LayerScore(scores.to(dtype), bias, total)


importances["nnrelief"] = NNRelief
