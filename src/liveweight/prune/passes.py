"""One pass of pruning: what to watch, and what its results do to the plan."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from liveweight._graph import Graph, Layer
from liveweight.prune import residual
from liveweight.prune.activity import Alive, Watch, observe
from liveweight.prune.importances import Importance, LayerScore, Target
from liveweight.prune.plan import Plan, drop_dead
from liveweight.prune.select import Keep, Rule, select
from liveweight.prune.structure import Panels

ALL_KINDS = ("conv", "linear")


class Scoring:
    """Scores of some targets after one pass over the data (no pass where none is needed).

    called   names of the targets that the data reached; all where the score needs no data
    """

    def __init__(self, importance: Importance, targets: dict[str, Target]) -> None:
        self._importance = importance
        self._targets = targets
        self._collects = hasattr(importance, "collect")
        self._seen: dict[str, object] = {}
        if not self._collects:
            self._seen = {name: importance.observer(target) for name, target in targets.items()}
        self.called = {name for name, seen in self._seen.items() if seen is None}
        self.watches = [
            Watch(name, targets[name].module, "input", seen)
            for name, seen in self._seen.items()
            if seen is not None
        ]

    def collect(self, model: nn.Module, data: Iterable | None) -> None:
        """Let an importance that runs the model itself do so."""
        if self._collects:
            self._seen = dict(self._importance.collect(model, self._targets, data))
            self.called |= set(self._seen)

    def refit(self, plan: Plan) -> None:
        """Let an importance fit the weights that a plan keeps to make up for the others."""
        if not hasattr(self._importance, "refit"):
            return
        for name in self.called:
            keep = plan.full_mask(name)
            plan.values[name] = self._importance.refit(self._targets[name], self._seen[name], keep)

    def solve(self, plan: Plan, rule: Rule) -> dict[str, Keep]:
        """Return what an importance that chooses and refits at once keeps; its values go along."""
        if rule.alpha is not None or rule.scope == "global":
            raise ValueError(
                f"importance {self._importance.name!r} goes with sparsity per layer or a pattern, "
                f"not with {rule}"
            )
        found = {}
        for name in self.called:
            target = self._targets[name]
            structure = rule.of(target)
            if structure is not None and not isinstance(structure, Panels):
                raise ValueError(f"importance {self._importance.name!r} makes no {structure}")
            known = (target, self._seen[name], plan.full_mask(name))
            keep, plan.values[name] = self._importance.solve(*known, rule.sparsity, structure)
            found[name] = Keep(keep)
        return found

    def scores(self) -> dict[str, LayerScore]:
        """Return the scores of the targets that were called."""
        return {
            name: self._importance.score(target, self._seen[name])
            for name, target in self._targets.items()
            if name in self.called
        }


def needs_data(importance: Importance) -> bool:
    return any(getattr(importance, f"needs_{what}", False) for what in ("data", "labels"))


def check_data(importance: Importance, data: object) -> None:
    """Raise ValueError where an importance needs data and there is none."""
    if data is None and needs_data(importance):
        labelled = " (input, labels)" if getattr(importance, "needs_labels", False) else ""
        raise ValueError(
            f"importance {importance.name!r} needs data: an iterable of batches{labelled}"
        )


def phases(importance: Importance, targets: dict[str, Target], scope: str) -> list[tuple[str, ...]]:
    """Return the kinds to score together, in order, without phases that have no target."""
    wanted = getattr(importance, "phases", (ALL_KINDS,)) if scope != "global" else (ALL_KINDS,)
    kinds = {t.kind for t in targets.values()}
    return [phase for phase in wanted if kinds & set(phase)]


def _maps_zero_to_zero(layer: Layer) -> bool:
    if layer.activation_fn is None:
        return True
    return bool(layer.activation_fn(torch.zeros(1, 1, 1, 1)).eq(0).all())


def _watch_units(model: nn.Module, graph: Graph, targets: dict[str, Target]) -> list[Watch]:
    """Watch the outputs whose units may turn out dead: after the norm, before the activation."""
    found = []
    for name in targets:
        layer = graph.layers.get(name)
        if layer is not None and _maps_zero_to_zero(layer):
            alive = Alive(
                layer.activation, layer.activation_fn, -1 if layer.kind == "linear" else 1
            )
            module = model.get_submodule(layer.norm or name)
            found.append(Watch(f"{name} (output)", module, "output", alive))
    return found


def run_pass(
    plan: Plan,
    targets: dict[str, Target],
    importance: Importance,
    rule: Rule,
    graph: Graph | None,
    data: Iterable | None,
) -> tuple[set[str], list[str]]:
    """Score some targets on one pass over the data and tighten the plan; nothing is written.

    Returns the names of the targets that the data reached, and notes.
    """
    scoring = Scoring(importance, targets)
    by_mass = rule.alpha is not None and graph is not None
    dead = by_mass and getattr(importance, "dead_units", False)
    units = _watch_units(plan.model, graph, targets) if dead else []
    blocks = []
    if by_mass and getattr(importance, "residual", False):
        blocks = [b for b in graph.residual_blocks if b.conv2 in targets]
    watched = [(block, residual.watches(plan.model, block)) for block in blocks]
    watches = [*scoring.watches, *units, *(w for _, pair in watched for w in pair)]
    called = observe(plan.model, watches, data) if watches else set()
    scoring.called |= called & set(targets)
    scoring.collect(plan.model, data)
    scores = scoring.scores()
    if rule.removes_units:
        scores = {name: score.between_units() for name, score in scores.items()}
    if hasattr(importance, "solve"):
        selected = scoring.solve(plan, rule)
    else:
        selected = select(scores, targets, plan.keeps, rule, _ties(importance))
    if rule.structure is not None:
        plan.remember(scores)
    plan.update(selected)
    if rule.removes_units:
        for name in selected:
            gone = ~plan.keeps[name].weight.flatten(1).any(1)
            layer = graph.layers.get(name) if graph is not None else None
            plan.drop_units(name, gone, layer.norm if layer is not None else None)
    scoring.refit(plan)
    for watch in units:
        name = watch.name.removesuffix(" (output)")
        if watch.observer.alive is not None:
            drop_dead(plan, graph.layers[name], watch.observer.alive)
    notes = []
    for block, pair in watched:
        maps: list[Tensor] = [w.observer.mean for w in pair if w.name in called]
        if len(maps) == 2:
            notes.append(residual.apply_rule(plan, block, *maps, rule.alpha["conv"]))
        else:
            notes.append(f"block '{block.name}': its shortcut was not seen; kept, not weighed")
    return scoring.called, [n for n in notes if n]


def _ties(importance: Importance) -> str:
    return getattr(importance, "ties", "stable")
