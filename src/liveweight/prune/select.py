"""Selection rules: from scores to what is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liveweight._check import check_fraction, near_misses
from liveweight.ops.mass_mask import mass_mask
from liveweight.prune.importances import LayerScore, Target

SCOPES = ("layer", "global")


@dataclass
class Keep:
    """What a layer keeps: weight bool Target.score_shape; bias bool [out] or None: not decided."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """alpha (share of mass kept, by kind) or sparsity (share of weights removed, by scope)."""

    alpha: dict[str, float] | None
    sparsity: float | None
    scope: str

    def covers(self, kind: str) -> bool:
        return self.alpha is None or kind in self.alpha


def parse_rule(
    alpha: float | dict[str, float] | None = None,
    sparsity: float | None = None,
    scope: str = "layer",
) -> Rule:
    """Return the rule that the arguments describe.

    alpha     number in [0, 1], or {"conv": number, "linear": number}; a kind left out is left alone
    sparsity  number in [0, 1]
    scope     "layer" or "global"; a mass rule always works per unit
    Raises ValueError where both or neither are given or a value is out of range.
    """
    if (alpha is None) == (sparsity is None):
        got = "neither" if alpha is None else "both"
        raise ValueError(f"give either alpha (mass kept) or sparsity (weights removed), got {got}")
    if scope not in SCOPES:
        raise ValueError(
            f"scope must be one of {SCOPES}, got {scope!r}: {near_misses(scope, SCOPES)}"
        )
    if alpha is None:
        return Rule(None, check_fraction("sparsity", sparsity), scope)
    if scope == "global":
        raise ValueError("scope='global' goes with sparsity; alpha works per unit")
    if not isinstance(alpha, dict):
        value = check_fraction("alpha", alpha)
        return Rule({"conv": value, "linear": value}, None, scope)
    for kind in alpha:
        if kind not in ("conv", "linear"):
            raise ValueError(
                f"alpha: unknown kind {kind!r}; {near_misses(str(kind), ('conv', 'linear'))}"
            )
    return Rule({k: check_fraction(f"alpha[{k!r}]", v) for k, v in alpha.items()}, None, scope)


def _check_scores(target: Target, score: LayerScore) -> None:
    if tuple(score.weight.shape) != target.score_shape:
        raise ValueError(
            f"layer '{target.name}': the importance returned scores of shape "
            f"{list(score.weight.shape)}, expected {list(target.score_shape)}"
        )
    for scores in (score.weight, score.bias):
        if scores is not None and not (torch.isfinite(scores).all() and (scores >= 0).all()):
            raise ValueError(f"layer '{target.name}': scores must be finite and >= 0")


def _by_mass(score: LayerScore, alive: Keep, alpha: float, ties: str) -> Keep:
    weight, bias = score.weight, score.bias
    rows = (weight * alive.weight).flatten(1)
    if bias is not None:
        bias = bias if alive.bias is None else bias * alive.bias
        rows = torch.cat([rows, bias.unsqueeze(1)], 1)
    rows = rows.float()
    keep = mass_mask(rows, alpha, ties=ties)
    if bias is None:
        return Keep(keep.view_as(weight))
    return Keep(keep[:, :-1].reshape(weight.shape), keep[:, -1].contiguous())


def _largest(scores: Tensor, sizes: Tensor, alive: Tensor, budget: int) -> Tensor:
    """Keep the largest live scores whose sizes sum to at most budget; equals by lower index."""
    order = torch.where(alive, scores, -1.0).sort(descending=True, stable=True).indices
    fits = (sizes[order] * alive[order]).cumsum(0) <= budget
    keep = torch.zeros_like(alive)
    keep[order] = fits
    return keep & alive


def _by_ratio(
    scores: dict[str, LayerScore],
    targets: dict[str, Target],
    alive: dict[str, Keep],
    sparsity: float,
) -> dict[str, Keep]:
    """Rank the entries of all the given layers together."""
    names = list(scores)
    flat = torch.cat([scores[n].weight.flatten() for n in names])
    live = torch.cat([alive[n].weight.flatten() for n in names])
    sizes = torch.cat(
        [torch.full((scores[n].weight.numel(),), targets[n].entry_size) for n in names]
    ).to(flat.device)
    budget = round((1.0 - sparsity) * int(sizes.sum()))
    keep = _largest(flat, sizes, live, budget)
    parts = keep.split([scores[n].weight.numel() for n in names])
    return {n: Keep(p.view_as(scores[n].weight)) for n, p in zip(names, parts, strict=True)}


def select(
    scores: dict[str, LayerScore],
    targets: dict[str, Target],
    alive: dict[str, Keep],
    rule: Rule,
    ties: str = "stable",
) -> dict[str, Keep]:
    """Return what every layer keeps; what is pruned already stays pruned.

    Under `alpha`, per unit, the smallest set of connections (the bias among them, where it is
    scored) that holds alpha of the unit's total. Under `sparsity`, exactly
    round((1 - sparsity) * weights) weights of each layer, or of all together (scope "global"; where
    layers differ in the weights per score, at most that many), fewer where fewer are left.
    """
    for name, score in scores.items():
        _check_scores(targets[name], score)
    if rule.alpha is not None:
        return {
            name: _by_mass(score, alive[name], rule.alpha[targets[name].kind], ties)
            for name, score in scores.items()
        }
    if rule.scope == "global":
        return _by_ratio(scores, targets, alive, rule.sparsity) if scores else {}
    kept: dict[str, Keep] = {}
    for name, score in scores.items():
        kept |= _by_ratio({name: score}, targets, alive, rule.sparsity)
    return kept
