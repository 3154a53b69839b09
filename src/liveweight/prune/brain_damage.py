"""Optimal Brain Damage, and two readings of its variation OBD-SD."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from liveweight._check import near_misses
from liveweight.prune.curvature import CURVATURES, exact_diagonal, per_sample
from liveweight.prune.gradient_criteria import _FromLoss
from liveweight.prune.importances import Target, importances
from liveweight.prune.loss import LabelledData, Loss
from liveweight.prune.structure import by_target

READINGS = ("standard-deviation", "signed-derivative")


def _check_name(argument: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        hint = near_misses(str(value), allowed)
        raise ValueError(f"{argument} must be one of {allowed}, got {value!r}: {hint}")
    return value


class Obd(_FromLoss):
    """Score h_kk w_k^2 / 2: what the loss gains to second order at a minimum if a weight goes.

    curvature   "fisher": h = mean over samples of the squared per-sample gradient;
                "gauss_newton": the diagonal of J^T H J, H the loss's second derivative by the
                outputs; "exact": the diagonal of the Hessian, one product per weight, for small
                nets (a negative h scores 0: removal would help)
    loss        loss(output, labels) -> the mean over a batch; default: cross-entropy

    A kernel scores the sum of its weights' scores.

    Source: LeCun, Denker, Solla, "Optimal brain damage", NeurIPS 1989.
    Raises ValueError for an unknown curvature, without labels, under inference_mode, and where the
    loss is not finite.
    """

    name = "obd"
    cost = "one forward and one backward pass, sample by sample"

    def __init__(self, curvature: str = "fisher", loss: Loss | None = None) -> None:
        super().__init__(loss)
        self.curvature = _check_name("curvature", curvature, CURVATURES)

    def collect(
        self, model: nn.Module, targets: Mapping[str, Target], data: Iterable
    ) -> dict[str, Tensor]:
        """Return max(h, 0) w^2 / 2 by layer name."""
        run = LabelledData(self.name, model, targets, self.loss)
        if self.curvature == "exact":
            h = exact_diagonal(run, data)
        else:
            h = {n: torch.zeros_like(w, dtype=torch.float64) for n, w in run.weights.items()}
            for _, second in per_sample(run, data, self.curvature):
                for name, part in second.items():
                    h[name] += part.double().sum(0)
            h = {name: total / run.samples for name, total in h.items()}
        return {
            name: by_target(
                0.5 * h[name].clamp_min(0) * w.detach().double().square(), targets[name]
            )
            for name, w in run.weights.items()
        }


class ObdSd(_FromLoss):
    """Score a weight by the loss it is predicted to cost, with its spread or its slope.

        d_kn = -g_kn w_k + h_kn w_k^2 / 2      the change of sample n's loss if weight k goes

    reading     "signed-derivative": s_k = |mean_n(-g_kn w_k) + h_kk w_k^2 / 2|, Optimal Brain
                Damage with its first-order term, for nets away from a minimum;
                "standard-deviation": s_k = max(0, mean_n d_kn + beta std_n d_kn)
    beta        standard deviations to add
    curvature   "fisher" or "gauss_newton", per sample
    loss        loss(output, labels) -> the mean over a batch; default: cross-entropy

    A kernel scores the sum of its weights' scores. Both readings are our definition: the formula of
    the paper that names OBD-SD is not public (Harang, Sanders, arXiv 2306.10177). The paper finds
    it slightly ahead of all others at substantial pruning; in our study `comparison` neither
    reading is, and the default is the one that came nearer.
    Raises ValueError for unknown names, a negative beta, without labels, under inference_mode, and
    where the loss is not finite.
    """

    name = "obd_sd"
    cost = Obd.cost

    def __init__(
        self,
        reading: str = "signed-derivative",
        beta: float = 1.0,
        curvature: str = "fisher",
        loss: Loss | None = None,
    ) -> None:
        super().__init__(loss)
        self.reading = _check_name("reading", reading, READINGS)
        self.curvature = _check_name("curvature", curvature, CURVATURES[:2])
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be finite and >= 0, got {beta}")
        self.beta = float(beta)

    def collect(
        self, model: nn.Module, targets: Mapping[str, Target], data: Iterable
    ) -> dict[str, Tensor]:
        """Return the scores by layer name."""
        run = LabelledData(self.name, model, targets, self.loss)
        first = {n: torch.zeros_like(w, dtype=torch.float64) for n, w in run.weights.items()}
        second = {n: torch.zeros_like(t) for n, t in first.items()}
        for gradients, curvatures in per_sample(run, data, self.curvature):
            for name, g in gradients.items():
                w = run.weights[name].detach().double()
                change = -g.double() * w + 0.5 * curvatures[name].double() * w.square()
                first[name] += change.sum(0)
                second[name] += change.square().sum(0)
        found = {}
        for name, total in first.items():
            mean = total / run.samples
            if self.reading == "signed-derivative":
                found[name] = by_target(mean.abs(), targets[name])
                continue
            spread = (second[name] / run.samples - mean.square()).clamp_min(0).sqrt()
            found[name] = by_target((mean + self.beta * spread).clamp_min(0), targets[name])
        return found


importances["obd"] = Obd
importances["obd_sd"] = ObdSd
