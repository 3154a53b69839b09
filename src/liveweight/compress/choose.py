"""Choosing by measurement: every layer gets the fastest module on its own input, dense included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from liveweight import _graph
from liveweight.compress import chains, edit, packing
from liveweight.compress.candidates import Candidate, Plan, build, check_formats, formats_for, plans
from liveweight.compress.chains import Chain, Sample
from liveweight.compress.decide import Verdict, decide, decide_whole
from liveweight.compress.inputs import (
    ExampleInputs,
    as_example_inputs,
    detached,
    device_of,
    difference,
    evaluating,
    run,
)
from liveweight.compress.listing import list_layers
from liveweight.compress.measure import BUSY_NOTE, Timings, measure_calls
from liveweight.compress.replacement import Replacement
from liveweight.compress.report import ChoiceRow, CompressReport

# A candidate this many times slower in its warm-up is not measured any further.
GIVE_UP_BEYOND = 8.0


def compress_(
    model: nn.Module,
    example_inputs: object,
    formats: str | Iterable[str] = "auto",
    min_speedup: float = 1.0,
    *,
    budget_s: float = 0.2,
    measure: Callable[..., Timings] = measure_calls,
) -> CompressReport:
    """Replace pruned layers by sparse ones where that is measurably faster; never slower.

    Every Linear and Conv2d is timed dense, in every fitting format and, on a CPU, dense with a
    weight packed for oneDNN, in turns, on the input it really receives. BatchNorm in eval mode is
    folded into it, ReLU (of a Linear also GELU) and max pooling behind it join it where they are
    modules of their own. The fastest replaces it if the lower quartile of dense time / its time
    over the rounds reaches min_speedup, and if it does so in the calmest rounds too.
    At the end the whole model is timed dense and compressed; choices that do not help are undone.

    model           changed in place; weights never change, but where a BatchNorm is folded into
                    them; masks go where the zeros are in a format and stay where a layer stays
                    dense
    example_inputs  a tensor, a tuple of arguments or a dict of keyword arguments, of the shapes
                    and on the device that matter
    formats         "auto" or names of formats; "dense" stands for packed dense layers
    min_speedup     at least 1.0
    budget_s        seconds of measuring per candidate
    returns         CompressReport: per layer what was chosen, times and the reason

    Raises TypeError and ValueError for unusable arguments, RuntimeError where the compressed
    model disagrees on example_inputs; the model is then as it was.
    """
    inputs = as_example_inputs("compress_", model, example_inputs)
    names = check_formats(formats)
    threshold = _check_speedup(min_speedup)
    if isinstance(budget_s, bool) or not isinstance(budget_s, (int, float)) or not budget_s > 0:
        raise ValueError(f"compress_: budget_s must be a number above 0, got {budget_s!r}")
    with edit.undone_on_error(model):
        return _Chooser(model, inputs, names, threshold, budget_s, measure).run()


def _check_speedup(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"compress_: min_speedup must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < 1.0:
        raise ValueError(
            f"compress_: min_speedup must be at least 1.0: slower is never taken; got {value}"
        )
    return float(value)


class _Chooser:
    """One call of compress_."""

    def __init__(self, model, inputs: ExampleInputs, formats, threshold, budget_s, measure) -> None:
        self.model = model
        self.inputs = inputs
        self.formats = formats
        self.threshold = threshold
        self.device = device_of(inputs)
        self.budget_s = budget_s
        self.measure = measure
        self.report = CompressReport(threads=torch.get_num_threads(), device=str(self.device))

    def run(self) -> CompressReport:
        """Choose layer by layer, then check and measure the whole."""
        self.report.layers, wanted = list_layers(self.model)
        found, outputs = chains.sample(self.model, self.inputs, set(wanted))
        expected = detached(outputs)
        graph = self._trace() if wanted else None
        chosen = []
        for name, row in wanted.items():
            layer = graph.layers.get(name) if graph else None
            replacement = self._choose(name, row, found, layer)
            chosen += [replacement] if replacement else []
        for replacement in chosen:
            replacement.apply()
        words = difference(expected, run(self.model, self.inputs))
        if words:
            raise RuntimeError(f"compress_: the compressed model disagrees: {words}")
        self._measure_whole(chosen)
        return self.report

    def _trace(self) -> _graph.Graph | None:
        try:
            return _graph.trace(self.model)
        except _graph.GraphError as error:
            self.report.notes.append(f"no layers were joined: {error}")
            return None

    def _choose(
        self, name: str, row: ChoiceRow, found: Sample, layer: _graph.Layer | None
    ) -> Replacement | None:
        if not found.inputs.get(name):
            never = name not in found.calls
            row.reason = "never runs on the example inputs" if never else "takes no single tensor"
            return None
        module = self.model.get_submodule(name)
        chain = Chain(name, module, found.inputs.pop(name)[0])
        if found.calls[name] == 1:
            chain.tail = chains.find_tail(self.model, layer, found, chain.x, self.report.notes)
        try:
            wanted = self._plans(chain, row.density)
        except ValueError as error:
            row.reason = f"dense: {error}"
            return None
        candidates, refused = build(chain, wanted)
        if not candidates:
            row.reason = "dense: " + "; ".join(refused)
            return None
        row.chain = chain.names
        verdict = self._race(chain, candidates, row.density)
        row.candidates, row.reason = verdict.times_us, "; ".join([verdict.reason, *refused])
        winner = next((c for c in candidates if c.label == verdict.winner), None)
        if winner is None:
            return None
        row.chosen, row.speedup = winner.format, verdict.speedup
        row.parts = (name, *winner.absorbed) if winner.absorbed else ()
        return Replacement(self.model, name, winner, row)

    def _plans(self, chain: Chain, density: float) -> list[Plan]:
        """Return what to build for a chain; raise ValueError with the reason where it is nothing.

        A Linear without zeros has no use for a sparse format; a Conv2d may, for what it takes in.
        """
        packs = "dense" in self.formats and packing.fits(chain.layer, self.device)
        if density < 1.0 or (chain.tail and isinstance(chain.layer, nn.Conv2d)):
            formats = formats_for(chain.layer, self.formats, self.device)
        elif packs:
            formats = []
        else:
            raise ValueError("it has no zeros")
        wanted = plans(chain, formats, packs)
        if not wanted:
            raise ValueError("formats names none for it")
        return wanted

    def _race(self, chain: Chain, candidates: list[Candidate], density: float) -> Verdict:
        calls = {"dense": chain.dense(), **{c.label: c.call for c in candidates}}

        def measure(budget: float) -> Timings:
            return self._time(calls, budget, give_up_beyond=GIVE_UP_BEYOND)

        return decide(measure, self.threshold, density)

    def _time(self, calls: dict[str, Callable], budget: float, **options) -> Timings:
        options |= {"budget_s": budget * self.budget_s, "device": self.device}
        timings = self.measure(calls, **options)
        if timings.busy and BUSY_NOTE not in self.report.notes:
            self.report.notes.append(BUSY_NOTE)
        return timings

    def _measure_whole(self, chosen: list[Replacement]) -> None:
        """Time the whole model dense and compressed; undo the weaker half until it is faster."""
        chosen = sorted(chosen, key=lambda r: r.saved_us)
        while chosen:
            timings, ratio = decide_whole(lambda budget, s=chosen: self._time_whole(s, budget))
            if ratio >= 1.0:
                self.report.dense_us = timings.median_us("dense")
                self.report.compressed_us = timings.median_us("compressed")
                self.report.speedup = ratio
                break
            half = (len(chosen) + 1) // 2
            for weak in chosen[:half]:
                weak.give_up(f"undone: the whole model ran at {ratio:.2f}x of dense with it")
            chosen = chosen[half:]
        else:
            self.report.notes.append("no layer was changed: the model is as it was")
        for replacement in chosen:
            replacement.apply()

    def _time_whole(self, chosen: list[Replacement], budget: float) -> Timings:
        def make_dense() -> None:
            for replacement in chosen:
                replacement.undo()

        def make_sparse() -> None:
            for replacement in chosen:
                replacement.apply()

        def call() -> object:
            return self.model(*self.inputs.args, **self.inputs.kwargs)

        with evaluating(self.model):
            prepare = {"dense": make_dense, "compressed": make_sparse}
            timings = self._time({"dense": call, "compressed": call}, budget, prepare=prepare)
        make_sparse()
        return timings
