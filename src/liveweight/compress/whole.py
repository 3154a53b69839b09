"""The last word: the whole model timed dense and compressed; what does not help is undone."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from liveweight import _graph
from liveweight.compress.chooser import Settings
from liveweight.compress.decide import decide_whole
from liveweight.compress.inputs import ExampleInputs, evaluating
from liveweight.compress.layouts import Layouts
from liveweight.compress.measure import Timings
from liveweight.compress.replacement import Replacement
from liveweight.compress.report import CompressReport
from liveweight.compress.residual import JoinedBlock

# A whole model is measured this many times longer than a candidate.
LONGER = 4.0
# So often the whole model is measured at most while choices are undone and tried again.
MOST_TRIALS = 12
# Choices that were undone come back if the model gets faster by more than this factor.
BETTER = 1.01


class Whole:
    """Times a model with choices and without, at every batch size."""

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[int, ExampleInputs],
        settings: Settings,
        report: CompressReport,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.settings = settings
        self.report = report
        self.layouts = Layouts(model, inputs, settings, report)
        self.joined: list[JoinedBlock] = []
        self.trials = 0
        self._lowest = 1.0  # the speed-up of the last set of choices that did not help

    def settle(
        self,
        chosen: list[Replacement],
        joined: list[JoinedBlock],
        ties: list[Replacement],
        graph: _graph.Graph | None,
    ) -> None:
        """Keep the choices that make the model faster, put them in place, and fill the report.

        A residual block stays joined where its last convolution stays replaced. Ties are put in
        place, all together, where they make the model that results faster.
        """
        self.joined = joined
        self._put(chosen, True)
        self.layouts.choose(chosen, graph)
        kept, lost = self._back_off(sorted(chosen, key=lambda r: r.saved_us))
        self._put(chosen, False)
        for weak in lost:
            weak.give_up(f"undone: the whole model ran at {self._lowest:.2f}x of dense with it")
        count = self._put(kept, True)
        if count:
            self.report.notes.append(f"the sums of {count} residual blocks are written in place")
        ties = [tie for tie in ties if tie.base is None or tie.base in kept]
        if not self._take(ties, alone=not kept) and not kept:
            self.report.notes.append("no layer was changed: the model is as it was")

    def _take(self, ties: list[Replacement], alone: bool) -> bool:
        """Put the ties in place for good if the model as it stands gets faster with them."""
        if not ties:
            return False
        found = [self._time(ties, inputs, 1.0) for inputs in self.inputs.values()]
        medians = [timings.speedup("compressed", "dense") for timings in found]
        gain = min(medians + [timings.calm_speedup("compressed", "dense") for timings in found])
        if gain < BETTER:
            return False
        for tie in ties:
            tie.take(f"packed: the whole model ran at {gain:.2f}x with all such layers")
        if alone:
            self.report.speedup, self.report.dense_us = 1.0, found[0].median_us("dense")
            self.report.compressed_us = self.report.dense_us
        self.report.speedup *= min(medians)
        self.report.compressed_us /= min(medians)
        return True

    def _put(self, chosen: list[Replacement], used: bool) -> int:
        """Put these choices in place or take them back; return how many blocks go with them."""
        names = {replacement.name for replacement in chosen}
        blocks = [block for block in self.joined if block.conv in names]
        for change in (*chosen, *blocks):
            (change.apply if used else change.undo)()
        return len(blocks)

    def _back_off(self, chosen: list[Replacement]) -> tuple[list[Replacement], list[Replacement]]:
        """Return the choices to keep and those to undo; chosen rises in what it saves.

        Where all together do not help, the stronger half is tried, and so on, then the weaker
        half; to what helps, the halves of what was left out are added again where they make the
        model faster.
        """
        if not chosen:
            return [], []
        if self.trials >= MOST_TRIALS:
            return [], chosen
        if self._helps(chosen):
            return chosen, []
        self.layouts.reset()  # neighbours are about to go
        if len(chosen) == 1:
            return [], chosen
        half = (len(chosen) + 1) // 2
        weak, strong = chosen[:half], chosen[half:]
        kept, lost = self._back_off(strong)
        if not kept:
            kept, lost = self._back_off(weak)
            return kept, lost + strong
        if lost:
            return kept, weak + lost
        for part in filter(None, (weak[half // 2 :], weak[: half // 2])):
            better = BETTER * self.report.speedup
            if self.trials < MOST_TRIALS and self._helps(part + kept, at_least=better):
                kept = part + kept
            else:
                lost = lost + part
        return kept, lost

    def _helps(self, chosen: list[Replacement], at_least: float = 1.0) -> bool:
        """True where the model with these choices is not slower than dense at any batch size."""
        self.trials += 1
        found = {}
        for size, inputs in self.inputs.items():
            found[size] = self._decide(chosen, inputs)
        lowest = min(ratio for _, ratio in found.values())
        if lowest < at_least:
            self._lowest = lowest
            return False
        size = min(found, key=lambda s: found[s][1])
        timings, self.report.speedup = found[size]
        self.report.dense_us = timings.median_us("dense")
        self.report.compressed_us = timings.median_us("compressed")
        if len(found) > 1:
            self.report.speedups = {size: ratio for size, (_, ratio) in found.items()}
        return True

    def _decide(self, chosen: list[Replacement], inputs: ExampleInputs) -> tuple[Timings, float]:
        """Return the times and the speed-up; on a GPU the lower one of graphs and plain calls.

        Graphs show what the kernels take, calls what launching them adds: users do both.
        """
        timings, ratio = decide_whole(lambda budget: self._time(chosen, inputs, budget))
        if self.settings.device.type != "cuda" or timings.note or ratio < 1.0:
            return timings, ratio
        plain, lower = decide_whole(lambda b: self._time(chosen, inputs, b, graphs=False))
        return (plain, lower) if lower < ratio else (timings, ratio)

    def _time(
        self, chosen: list[Replacement], inputs: ExampleInputs, budget: float, **options: object
    ) -> Timings:
        def set_up(used: bool) -> Callable[[], None]:
            return lambda: self._put(chosen, used)

        def call() -> object:
            return self.model(*inputs.args, **inputs.kwargs)

        calls = {"dense": call, "compressed": call}
        prepare = {"dense": set_up(False), "compressed": set_up(True)}
        with evaluating(self.model):
            notes, budget = self.report.notes, LONGER * budget
            options |= {"prepare": prepare, "min_rounds": 3}
            timings = self.settings.time(calls, budget, notes, **options)
        set_up(False)()
        return timings
