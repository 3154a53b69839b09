"""LAMP: an importance from the weights alone that compares between layers."""

from __future__ import annotations

import torch

from liveweight.prune.importances import LayerScore, Target, importances, score_dtype
from liveweight.prune.structure import by_target


class Lamp:
    """Score a weight by its share of the squares that are no smaller in its layer.

        s_k = w_k^2 / sum of w_l^2 over all l of the layer with |w_l| >= |w_k|

    Equal weights count in the order of their index. Inside a layer the order is that of |w|; over
    layers (scope="global") the largest weight of every layer scores 1, so none is emptied. Sums
    are float64. A kernel scores the sum of its weights' scores.

    Source: Lee, Park, Mo, Ahn, Shin, "Layer-adaptive sparsity for the magnitude-based pruning",
    ICLR 2021.
    """

    name = "lamp"
    cost = "a sort per layer"

    def default_granularity(self, kind: str) -> str:
        return "weight"

    def observer(self, target: Target) -> None:
        return None

    def score(self, target: Target, seen: None) -> LayerScore:
        weight = target.module.weight.detach()
        squares, order = weight.double().square().flatten().sort(stable=True)
        # From the end: what is left of the sum once all smaller weights are gone.
        rest = squares.flip(0).cumsum(0).flip(0)
        scores = torch.where(rest > 0, squares / rest, 0.0)
        scores = torch.empty_like(scores).index_copy_(0, order, scores).view_as(weight)
        return LayerScore(by_target(scores.to(score_dtype(weight)), target))


importances["lamp"] = Lamp
