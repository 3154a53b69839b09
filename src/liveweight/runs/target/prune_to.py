"""prune_to_: prune a model until it costs so many parameters, FLOPs or seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import nn

from liveweight import prune
from liveweight._check import check_fraction, near_misses
from liveweight.compress.inputs import ExampleInputs, as_example_inputs
from liveweight.prune.batches import Batches
from liveweight.prune.cut import cut_layers
from liveweight.prune.importances import Importance, resolve_importance
from liveweight.prune.selectors import Selector
from liveweight.runs.target.cost import (
    COUNTS,
    Cost,
    Flops,
    Given,
    Latency,
    Parameters,
    copied,
)
from liveweight.runs.target.goal import Goal, parse_goal
from liveweight.runs.target.guess import expected_sparsity
from liveweight.runs.target.report import TargetReport, Trial
from liveweight.runs.target.scores import Recorder, Replay, can_repeat
from liveweight.runs.target.search import Search

Selectors = Selector | Iterable[Selector] | None


def prune_to_(
    model: nn.Module,
    data: Iterable | None,
    example_inputs: object,
    *,
    target_latency: float | str | None = None,
    target_parameters: float | str | None = None,
    target_flops: float | str | None = None,
    importance: str | Importance = "nnrelief",
    granularity: str | None = None,
    block: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None,
    scope: str = "layer",
    layers: Selectors = None,
    ignore: Selectors = None,
    steps: int | None = None,
    count: str = "kept",
    max_sparsity: float = 0.99,
    tolerance: float = 0.02,
    max_trials: int = 20,
    part: float = 1.0,
    rounds: int = 1,
    finetune: Callable[[TargetReport], object] | None = None,
    measure: Callable[[nn.Module], float] | None = None,
    compile_dense: bool = True,
    on_trial: Callable[[Trial], object] = lambda trial: None,
) -> TargetReport:
    """Prune a model to the least sparsity at which it costs at most a target; attach masks.

    Copies are pruned to one sparsity after another and their cost taken; only at last the model is
    pruned, as `prune_` does. Where no sparsity meets the target, the model stays as it was,
    `report.reached` is False, and `report.lowest` is the nearest.

    target_latency     seconds of one call on example_inputs, or "50%" of the fastest dense form
                       (plain, channels_last, torch.compile): a copy is shrunk, compressed and timed
                       in turns with it
    target_parameters  how many parameters, or "10%" of the model's; target_flops: how many FLOPs of
                       one call on example_inputs (two per multiply-add), or a share
    count              what these two count after `shrink_`: "kept", what is not pruned; "dense",
                       all that is left, zeros included
    importance ... steps  as in `prune_`; data may be None where the importance needs none
    max_sparsity       beyond it nothing is tried; tolerance: a cost this far below the target is
                       near enough; max_trials: at most so many sparsities are tried in a round
    rounds, finetune   go there in equal factors: after each round finetune(report) is called to
                       train the model under `keep_masks`. A round whose target is out of reach ends
                       it: the model then stays at the target before
    part               aim at dense (target / dense)^part: for a loop of your own over prune_to_
    measure            measure(pruned copy) -> seconds, instead of timing here: another machine, a
                       simulator. The copy is in eval mode, its zeros permanent
    compile_dense      let torch.compile take part, where it takes seconds to compile
    on_trial           called with each Trial
    returns            TargetReport: reached, sparsity, cost, target, dense, trials, stopped, pruned

    A pass over the data is taken for each trial where scores depend on earlier cuts (nnrelief with
    scope "layer", obs, sparsegpt), one in all otherwise. Raises as `prune_`, and ValueError or
    TypeError for unusable targets and arguments; the model is then as it was.
    """
    goal = parse_goal(
        target_latency=target_latency,
        target_parameters=target_parameters,
        target_flops=target_flops,
    )
    inputs = as_example_inputs("prune_to_", model, example_inputs)
    importance = resolve_importance(importance)
    _check_counts(max_trials=max_trials, rounds=rounds)
    _check_range(max_sparsity, tolerance, part)
    options = {
        "granularity": granularity,
        "block": block,
        "scope": scope,
        "layers": layers,
        "ignore": ignore,
    }
    held = None if data is None else Batches(data, steps, passes=2)
    # Names what is wrong with data and options before the dense model is timed.
    prune.prune_(model, held, importance=importance, sparsity=0.0, steps=1, dry_run=True, **options)
    cost = _make_cost(model, inputs, goal, count, measure, compile_dense)
    way = _Way(model, held, importance, options, inputs, goal, cost, on_trial)
    limits = {"highest": max_sparsity, "tolerance": tolerance, "most": max_trials}
    earlier: list[TargetReport] = []
    for turn in range(1, rounds + 1):
        report = way.go(goal.cost(cost.dense, part * turn / rounds), limits)
        report.earlier = list(earlier)
        if not report.reached:
            break
        earlier.append(report)
        if finetune is not None:
            finetune(report)
    return report


def _check_counts(**counts: object) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_range(max_sparsity: float, tolerance: float, part: float) -> None:
    for name, value in (("max_sparsity", max_sparsity), ("part", part)):
        if check_fraction(name, value) == 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    if check_fraction("tolerance", tolerance) == 1:
        raise ValueError(f"tolerance must be below 1, got {tolerance}")


def _make_cost(
    model: nn.Module,
    inputs: ExampleInputs,
    goal: Goal,
    count: str,
    measure: Callable[[nn.Module], float] | None,
    compile_dense: bool,
) -> Cost:
    if count not in COUNTS:
        raise ValueError(
            f"count must be one of {COUNTS}, got {count!r}: {near_misses(str(count), COUNTS)}"
        )
    if measure is not None and goal.kind != "latency":
        raise ValueError(f"measure goes with target_latency, not with target_{goal.kind}")
    if measure is not None and not callable(measure):
        raise TypeError(f"measure must be callable, got {type(measure).__name__}")
    if goal.kind == "latency":
        if measure is not None:
            return Given(model, measure)
        return Latency(model, inputs, goal.relative, compile_dense)
    return {"parameters": Parameters, "flops": Flops}[goal.kind](model, inputs, count)


class _Way:
    """The way of one model to one target: rounds of trials on copies, then the pruning itself."""

    def __init__(
        self,
        model: nn.Module,
        data: Iterable | None,
        importance: Importance,
        options: dict[str, object],
        inputs: ExampleInputs,
        goal: Goal,
        cost: Cost,
        on_trial: Callable[[Trial], object],
    ) -> None:
        self.model, self.data, self.importance, self.options = model, data, importance, options
        self.inputs, self.goal, self.cost, self.on_trial = inputs, goal, cost, on_trial

    def go(self, target: float, limits: dict) -> TargetReport:
        """Prune the model to a cost, or leave it where that is out of reach."""
        scored = self.importance
        first = self._first(target, limits["highest"])
        search = Search(
            target, self.cost.dense, resolution=self.cost.resolution, first=first, **limits
        )
        trials: list[Trial] = []
        while (sparsity := search.ask()) is not None:
            if can_repeat(self.importance, self.options["scope"]) and not trials:
                scored = Recorder(self.importance)
            trials.append(Trial(sparsity, self._try(sparsity, scored)))
            if isinstance(scored, Recorder):
                scored = Replay(scored)
            search.tell(sparsity, trials[-1].cost)
            self.on_trial(trials[-1])
        report = TargetReport(
            self.goal.kind, str(self.goal), target, self.cost.dense, trials, search.stopped
        )
        report.notes = list(self.cost.notes)
        if search.best is not None:
            report.pruned = self._prune(self.model, search.best, scored)
            report.sparsity = search.best
            report.cost = next(t.cost for t in trials if t.sparsity == search.best)
        return report

    def _first(self, target: float, highest: float) -> float | None:
        """Return where the search starts; None: at 1 - target / dense."""
        by = self.options["granularity"]
        default = self.importance.default_granularity
        granularity = {kind: by or default(kind) for kind in ("linear", "conv")}
        timed_here = self.goal.kind == "latency" and not isinstance(self.cost, Given)
        if timed_here or set(granularity.values()) == {"neuron"}:
            share = min(target / self.cost.dense, 1.0)
            return expected_sparsity(self.model, self.inputs, share, granularity, highest=highest)
        return None

    def _try(self, sparsity: float, importance: Importance) -> float:
        twin = copied(self.model)
        self._prune(twin, sparsity, importance)
        return math.inf if cut_layers(twin) else self.cost.of(twin)

    def _prune(
        self, model: nn.Module, sparsity: float, importance: Importance
    ) -> prune.PruneReport:
        return prune.prune_(
            model, self.data, importance=importance, sparsity=sparsity, **self.options
        )
