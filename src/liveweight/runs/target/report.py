"""What a pruning to a target tried and reached."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field

from liveweight.prune import PruneReport


@dataclass(frozen=True)
class Trial:
    """One sparsity and its cost; math.inf where nothing of the input gets through any more."""

    sparsity: float
    cost: float


@dataclass
class TargetReport:
    """A target, the way to it, and where it ended. Costs are seconds, parameters or FLOPs.

    kind      "latency", "parameters" or "flops"
    asked     the target as it was given, in words
    target    the cost to get down to; on the way there in several rounds, this round's
    dense     the cost with nothing pruned
    reached   the model is pruned, and costs at most the target; otherwise it is as it was
    sparsity  what it was pruned to: the least that was found to meet the target; None: not reached
    cost      the cost there
    trials    every sparsity that was tried, in order, and its cost
    stopped   why no more were tried
    pruned    the report of the pruning
    earlier   the reports of the rounds before
    """

    kind: str
    asked: str
    target: float
    dense: float
    trials: list[Trial]
    stopped: str
    sparsity: float | None = None
    cost: float | None = None
    pruned: PruneReport | None = None
    notes: list[str] = field(default_factory=list)
    earlier: list[TargetReport] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        return self.sparsity is not None

    @property
    def lowest(self) -> Trial:
        """The trial of the lowest cost."""
        return min(self.trials, key=lambda trial: (trial.cost, trial.sparsity))

    def table(self) -> str:
        """Return one line per trial, in order of sparsity."""
        rows = ["sparsity  share of dense  cost"]
        for trial in sorted(self.trials, key=lambda t: t.sparsity):
            mark = "  <-" if trial.sparsity == self.sparsity else ""
            share = f"{trial.cost / self.dense:.1%}" if math.isfinite(trial.cost) else "-"
            rows.append(f"{trial.sparsity:8.4f}  {share:>14}  {self._say(trial.cost)}{mark}")
        return "\n".join(rows)

    def to_json(self) -> str:
        """Return the report as a JSON object; a model that was cut through has cost null."""
        plain = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("trials", "pruned", "earlier")
        }
        plain |= {"reached": self.reached, "summary": self.summary()}
        plain["trials"] = [
            {"sparsity": t.sparsity, "cost": t.cost if math.isfinite(t.cost) else None}
            for t in self.trials
        ]
        plain["pruned"] = None if self.pruned is None else json.loads(self.pruned.to_json())
        plain["earlier"] = [json.loads(report.to_json()) for report in self.earlier]
        return json.dumps(plain, indent=2)

    def summary(self) -> str:
        """Return the outcome in a line."""
        aim = f"{self.asked}, {self._say(self.target)} (dense {self._say(self.dense)})"
        tries = f"{len(self.trials)} trial{'' if len(self.trials) == 1 else 's'}"
        if self.reached:
            share = f"{self.cost / self.dense:.1%} of dense"
            return (
                f"{aim}: {self._say(self.cost)}, {share}, at sparsity {self.sparsity:.4f}; "
                f"{tries}, {self.stopped}"
            )
        best = self.lowest
        got = f"lowest {self._say(best.cost)} at sparsity {best.sparsity:.4f}"
        return f"{aim}: not reached, the model is as it was; {got}; {tries}, {self.stopped}"

    def _say(self, cost: float) -> str:
        if math.isinf(cost):
            return "cut through"
        if self.kind == "latency":
            return f"{cost * 1e6:,.1f} us"
        return f"{cost:,.0f} {'FLOPs' if self.kind == 'flops' else self.kind}"

    def __str__(self) -> str:
        return "\n".join([self.summary(), self.table(), *(f"note: {n}" for n in self.notes)])
