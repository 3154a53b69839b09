"""SNIP and Taylor: what the loss would lose to first order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from liveweight.prune.importances import LayerScore, Target, importances, score_dtype
from liveweight.prune.loss import LabelledData, Loss
from liveweight.prune.structure import by_target


class _FromLoss:
    """An importance that runs the model on labelled batches itself.

    loss   loss(output, labels) -> the mean over the samples of a batch; default: cross-entropy
    """

    needs_data = needs_labels = needs_gradients = True

    def __init__(self, loss: Loss | None = None) -> None:
        self.loss = loss

    def default_granularity(self, kind: str) -> str:
        return "weight"

    def observer(self, target: Target) -> None:
        return None

    def score(self, target: Target, seen: Tensor) -> LayerScore:
        return LayerScore(seen.to(score_dtype(target.module.weight)))


class Snip(_FromLoss):
    """Score |w dL/dw|, L the mean loss over the data: how much the loss depends on a connection.

    A kernel scores |sum over its weights of w dL/dw|: the derivative by a gate on the kernel. The
    source normalises by the sum over the net, which changes no ranking.

    Source: Lee, Ajanthan, Torr, "SNIP: single-shot network pruning based on connection
    sensitivity", ICLR 2019.
    Raises ValueError without labels, under inference_mode, and where the loss is not finite.
    """

    name = "snip"
    cost = "one forward and one backward pass"

    def collect(
        self, model: nn.Module, targets: Mapping[str, Target], data: Iterable
    ) -> dict[str, Tensor]:
        """Return |sum over batches of w dL/dw| by layer name."""
        run = LabelledData(self.name, model, targets, self.loss)
        sums = {n: t.module.weight.detach().double().new_zeros(()) for n, t in targets.items()}
        for gradients, samples in run.gradients(data):
            for name, g in gradients.items():
                sums[name] = sums[name] + g.double() * samples
        return {
            name: by_target(total / run.samples * run.weights[name].detach(), targets[name]).abs()
            for name, total in sums.items()
        }


class Taylor(_FromLoss):
    """Score (w dL/dw)^2, the mean over batches: the squared first-order change of the loss.

    A kernel scores (sum over its weights of w dL/dw)^2, as one gate on the kernel would.

    Source: Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance estimation for neural network
    pruning", CVPR 2019 (its method 0).
    Raises ValueError without labels, under inference_mode, and where the loss is not finite.
    """

    name = "taylor"
    cost = Snip.cost

    def collect(
        self, model: nn.Module, targets: Mapping[str, Target], data: Iterable
    ) -> dict[str, Tensor]:
        """Return the mean over batches of (w dL/dw)^2 by layer name."""
        run = LabelledData(self.name, model, targets, self.loss)
        sums: dict[str, Tensor] = {}
        batches = 0
        for gradients, _ in run.gradients(data):
            batches += 1
            for name, g in gradients.items():
                change = by_target(g.double() * run.weights[name].detach(), targets[name])
                sums[name] = sums.get(name, 0.0) + change.square()
        return {name: total / batches for name, total in sums.items()}


importances["snip"] = Snip
importances["taylor"] = Taylor
