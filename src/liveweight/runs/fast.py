"""From a pruned model to a fast one that is never slower at any of the recipe's batch sizes."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field

from torch import Tensor, nn

from liveweight import compress
from liveweight.runs.recipe import CompressRecipe

# Two candidates closer than this cannot be told apart on a busy machine.
NOISE = 0.02


@dataclass
class FastModel:
    """The compressed model, the shrunk one it came from, and what was decided.

    chosen_at  batch size whose measured choices were kept; None: dense kernels were kept
    """

    model: nn.Module
    shrunk: nn.Module
    shrink_report: dict | None
    compress_report: dict | None
    chosen_at: int | None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        return {
            "shrink": self.shrink_report,
            "choices": self.compress_report,
            "chosen_at": self.chosen_at,
        }


def make_fast(model: nn.Module, inputs: dict[int, Tensor], recipe: CompressRecipe) -> FastModel:
    """Shrink the model, compress it at each batch size, keep the choices that are best at all.

    compress_ measures one example input; what wins at batch 64 can lose at batch 1. So every
    distinct set of choices is timed at every batch size, and the one whose worst speed-up over
    the shrunk dense model is highest is kept. Where that is below 1, dense kernels stay.
    """
    shrunk = copy.deepcopy(model)
    shrink_report = None
    if recipe.shrink:
        report = compress.shrink_(shrunk, next(iter(inputs.values())))
        shrink_report = json.loads(report.to_json())
    candidates = {}
    for size, x in inputs.items():
        candidate = copy.deepcopy(shrunk)
        report = compress.compress_(
            candidate, x, formats=recipe.formats, min_speedup=recipe.min_speedup
        )
        if _choices(report) not in [_choices(r) for _, r in candidates.values()]:
            candidates[size] = (candidate, report)
    speedups = {size: _speedups(shrunk, m, inputs) for size, (m, _) in candidates.items()}
    best = max(speedups, key=lambda size: min(speedups[size].values()))
    notes = [_note(size, found) for size, found in speedups.items()]
    if min(speedups[best].values()) < 1 - NOISE:
        notes.append("No set of choices was at least as fast as dense at every batch size: dense.")
        return FastModel(copy.deepcopy(shrunk), shrunk, shrink_report, None, None, notes)
    model, report = candidates[best]
    return FastModel(model, shrunk, shrink_report, json.loads(report.to_json()), best, notes)


def _choices(report) -> list[tuple]:
    return [(row.name, row.chosen, tuple(row.parts)) for row in report.layers]


def _speedups(shrunk: nn.Module, candidate: nn.Module, inputs: dict[int, Tensor]) -> dict:
    """Return batch size -> median of the paired (shrunk dense time / candidate time)."""
    return {
        size: compress.benchmark(candidate, x, against={"dense": shrunk})["dense"].ratio
        for size, x in inputs.items()
    }


def _note(size: int, speedups: dict[int, float]) -> str:
    text = ", ".join(f"{ratio:.2f}x at batch {at}" for at, ratio in speedups.items())
    return f"Choices measured at batch {size}, against the shrunk dense model: {text}."
