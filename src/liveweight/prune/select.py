"""Selection rules: from scores to what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from liveweight._check import check_fraction, near_misses
from liveweight.ops.mass_mask import mass_mask
from liveweight.ops.top_k_mask import top_k_mask
from liveweight.prune.importances import LayerScore, Target
from liveweight.prune.structure import Blocks, Neurons, Panels, Structure

SCOPES = ("layer", "global")


@dataclass
class Keep:
    """What a layer keeps: weight bool Target.score_shape; bias bool [out] or None: not decided."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """alpha (share of mass kept, by kind) or sparsity (share of weights removed, by scope).

    structure   by kind of layer, None: entries are kept or dropped one by one. A V:N:M pattern says
                itself how much it keeps: alpha and sparsity are then None.
    """

    alpha: dict[str, float] | None
    sparsity: float | None
    scope: str
    structure: dict[str, Structure] | None = None

    def why_not(self, target: Target) -> str:
        """Return why the rule leaves a layer alone, "" where it covers it."""
        if self.alpha is not None and target.kind not in self.alpha:
            return f"alpha has no {target.kind!r}"
        if self.structure is None:
            return ""
        if target.kind not in self.structure:
            noun = next(iter(self.structure.values())).noun
            return f"{'block' if noun == 'block' else 'pattern'} has no {target.kind!r}"
        return self.structure[target.kind].unfit(target)

    @property
    def removes_units(self) -> bool:
        """Whether whole units go, with their biases."""
        return self.structure is not None and any(
            isinstance(s, Neurons) for s in self.structure.values()
        )

    def of(self, target: Target) -> Structure | None:
        """Return the structure of a layer's mask."""
        return None if self.structure is None else self.structure[target.kind]

    def __str__(self) -> str:
        if self.alpha is not None:
            return "alpha " + ", ".join(f"{k} {v:g}" for k, v in self.alpha.items())
        if self.sparsity is not None:
            return f"sparsity {self.sparsity:g} per {'layer' if self.scope == 'layer' else 'model'}"
        return ", ".join(f"{k} {v}" for k, v in self.structure.items())


def parse_rule(
    alpha: float | dict[str, float] | None = None,
    sparsity: float | None = None,
    scope: str = "layer",
    structure: dict[str, Structure] | None = None,
) -> Rule:
    """Return the rule that the arguments describe.

    alpha      number in [0, 1], or {"conv": number, "linear": number}; leaves other kinds alone
    sparsity   number in [0, 1]
    scope      "layer" or "global"; a mass rule always works per unit
    structure  what parse_structure returned
    Raises ValueError where both or neither of alpha and sparsity are given (a V:N:M pattern takes
    neither) or a value is out of range.
    """
    fixed = structure is not None and any(isinstance(s, Panels) for s in structure.values())
    if fixed and (alpha is not None or sparsity is not None):
        raise ValueError(
            "a V:N:M pattern keeps 2/M of the weights: give neither alpha nor sparsity with it"
        )
    if (alpha is None) == (sparsity is None) and not fixed:
        got = "neither" if alpha is None else "both"
        raise ValueError(f"give either alpha (mass kept) or sparsity (weights removed), got {got}")
    if scope not in SCOPES:
        raise ValueError(
            f"scope must be one of {SCOPES}, got {scope!r}: {near_misses(scope, SCOPES)}"
        )
    if scope == "global" and sparsity is None:
        why = "a V:N:M pattern works per row" if fixed else "alpha works per unit"
        raise ValueError(f"scope='global' goes with sparsity; {why}")
    if sparsity is not None:
        return Rule(None, check_fraction("sparsity", sparsity), scope, structure)
    if alpha is None:
        return Rule(None, None, scope, structure)
    if not isinstance(alpha, dict):
        value = check_fraction("alpha", alpha)
        return Rule({"conv": value, "linear": value}, None, scope, structure)
    for kind in alpha:
        if kind not in ("conv", "linear"):
            raise ValueError(
                f"alpha: unknown kind {kind!r}; {near_misses(str(kind), ('conv', 'linear'))}"
            )
    shares = {k: check_fraction(f"alpha[{k!r}]", v) for k, v in alpha.items()}
    return Rule(shares, None, scope, structure)


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


def _blocks_by_mass(
    score: LayerScore, alive: Keep, alpha: float, ties: str, blocks: Blocks
) -> Keep:
    """Keep, per row of blocks, the fewest that hold alpha of its sum; biases do not compete."""
    sums = blocks.sums(score.weight * alive.weight).float()
    kept = mass_mask(sums, alpha, ties=ties)
    return Keep(blocks.spread(kept, score.weight.shape) & alive.weight)


@dataclass
class _Entries:
    """What one layer keeps or drops, entry by entry: three flat tensors, and the way back.

    rank    float64, what is compared: the score, of a block the mean score of its entries
    sizes   int64, live weights of each entry; 0: gone already
    spread  from kept entries, bool, to a mask in the shape of the scores
    """

    rank: Tensor
    sizes: Tensor
    spread: Callable[[Tensor], Tensor]


def _entries(score: LayerScore, entry_size: int, alive: Keep, blocks: Blocks | None) -> _Entries:
    weight, live = score.weight, alive.weight
    if blocks is None:
        sizes = live.flatten() * entry_size
        return _Entries(weight.flatten(), sizes, lambda keep: keep.view_as(weight))
    area = blocks.sums(torch.ones_like(weight))
    rank = blocks.sums(weight * live) / area
    sizes = (blocks.sums(live) * entry_size).long()
    return _Entries(
        rank.flatten(),
        sizes.flatten(),
        lambda keep: blocks.spread(keep.view_as(area), weight.shape) & live,
    )


def _largest(scores: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Keep the largest scores whose sizes sum to at most budget; equals by lower index."""
    return top_k_mask(scores[None], budget, scope="global", sizes=sizes[None])[0]


def _by_ratio(
    scores: dict[str, LayerScore],
    targets: dict[str, Target],
    alive: dict[str, Keep],
    rule: Rule,
) -> dict[str, Keep]:
    """Rank the entries of all the given layers together."""
    found = {
        n: _entries(s, targets[n].entry_size, alive[n], rule.of(targets[n]))
        for n, s in scores.items()
    }
    rank = torch.cat([e.rank for e in found.values()])
    sizes = torch.cat([e.sizes for e in found.values()])
    total = sum(s.weight.numel() * targets[n].entry_size for n, s in scores.items())
    keep = _largest(rank, sizes, round((1.0 - rule.sparsity) * total))
    if rule.structure is not None and rule.scope == "layer" and rule.sparsity < 1:
        _keep_the_best_(keep, rank, sizes)
    parts = keep.split([e.rank.numel() for e in found.values()])
    return {n: Keep(e.spread(p)) for (n, e), p in zip(found.items(), parts, strict=True)}


def _keep_the_best_(keep: Tensor, rank: Tensor, sizes: Tensor) -> None:
    """Keep the best live block of a layer of which no block would fit: it must stay connected."""
    if not keep.any() and (sizes > 0).any():
        keep[torch.where(sizes > 0, rank, -1.0).argmax()] = True


def best_blocks(means: Tensor, sizes: Tensor, budget: int, sparsity: float) -> Tensor:
    """Return which blocks of one layer `select` keeps: bool [rows, columns].

    means   score of each block per entry; sizes: its live weights; budget: weights that may stay
    """
    means, sizes, shape = means.flatten(), sizes.flatten().long(), means.shape
    keep = _largest(means, sizes, budget)
    if sparsity < 1:
        _keep_the_best_(keep, means, sizes)
    return keep.view(shape)


def _select_layer(score: LayerScore, target: Target, alive: Keep, rule: Rule, ties: str) -> Keep:
    structure = rule.of(target)
    if isinstance(structure, Panels):
        return Keep(structure.select(score.weight, alive.weight))
    if rule.alpha is None:
        return _by_ratio({target.name: score}, {target.name: target}, {target.name: alive}, rule)[
            target.name
        ]
    alpha = rule.alpha[target.kind]
    if structure is not None:
        return _blocks_by_mass(score, alive, alpha, ties, structure)
    return _by_mass(score, alive, alpha, ties)


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

    With blocks, `alpha` holds per row of blocks, without biases; `sparsity` keeps the blocks of the
    largest mean score, at most as many weights as asked for, but of each layer at least one block
    (scope "layer", sparsity < 1). With a V:N:M pattern, what Panels.select keeps.
    """
    for name, score in scores.items():
        _check_scores(targets[name], score)
    if rule.scope == "global":
        return _by_ratio(scores, targets, alive, rule) if scores else {}
    return {n: _select_layer(s, targets[n], alive[n], rule, ties) for n, s in scores.items()}
