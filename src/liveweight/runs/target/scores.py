"""Scores found once and used again, where one model in one state is pruned to many sparsities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from liveweight.prune import Importance, LayerScore, Observer, Target


def can_repeat(importance: Importance, scope: str) -> bool:
    """Return whether the scores of a pruning do not depend on how much it prunes.

    They do where later layers are scored behind the cut of earlier ones (`phases`, unless all
    layers are ranked together), and where weights are chosen and refitted at once.
    """
    refits = hasattr(importance, "solve") or hasattr(importance, "refit")
    return not refits and (scope == "global" or not hasattr(importance, "phases"))


class Recorder:
    """An importance that keeps what it scored, by layer name in `found`."""

    def __init__(self, importance: Importance) -> None:
        self.importance, self.name = importance, importance.name
        self.found: dict[str, LayerScore] = {}

    def __getattr__(self, name: str) -> object:
        if name == "importance":  # not set yet: a copy in the making
            raise AttributeError(name)
        return getattr(self.importance, name)

    def default_granularity(self, kind: str) -> str:
        return self.importance.default_granularity(kind)

    def observer(self, target: Target) -> Observer | None:
        return self.importance.observer(target)

    def score(self, target: Target, seen: Observer | None) -> LayerScore:
        found = self.importance.score(target, seen)
        self.found[target.name] = found
        return found


class Replay:
    """The scores of a Recorder again, without data."""

    needs_data = needs_labels = needs_gradients = False

    def __init__(self, recorder: Recorder) -> None:
        self.importance, self.name = recorder.importance, recorder.name
        self.found = recorder.found

    def __getattr__(self, name: str) -> object:
        if name == "importance":
            raise AttributeError(name)
        return getattr(self.importance, name)

    def default_granularity(self, kind: str) -> str:
        return self.importance.default_granularity(kind)

    def observer(self, target: Target) -> None:
        return None

    def collect(
        self, model: nn.Module, targets: Mapping[str, Target], data: Iterable | None
    ) -> dict[str, None]:
        """Name the layers that were reached when the scores were found."""
        return {name: None for name in targets if name in self.found}

    def score(self, target: Target, seen: None) -> LayerScore:
        return self.found[target.name]
