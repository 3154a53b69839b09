"""Choosing by measurement: every layer gets the fastest module on its own input, dense included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from liveweight import _graph
from liveweight.compress import chains, edit, swap
from liveweight.compress.candidates import Candidate, build, check_formats, formats_for
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

    Every Linear and Conv2d with zeros is timed dense and in every fitting format, in turns, on
    the input it really receives, alone and joined with a ReLU and max pooling behind it; so is a
    Conv2d without zeros that has something to join. The
    fastest replaces it if the lower quartile of dense time / its time over the rounds reaches
    min_speedup, and if it does so in the calmest rounds too.
    At the end the whole model is timed dense and compressed; choices that do not help are undone.

    model           changed in place; weights never change, masks go where the zeros are in a
                    format and stay where a layer stays dense
    example_inputs  a tensor, a tuple of arguments or a dict of keyword arguments, of the shapes
                    and on the device that matter
    formats         "auto" or names out of "unstructured" and "kernelwise"
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
        wanted = self._list_layers()
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

    def _list_layers(self) -> dict[str, ChoiceRow]:
        """Fill the report's rows; return those of layers that may get candidates."""
        tied = edit.tied_parameters(self.model)
        paths = edit.paths_by_module(self.model)
        wanted = {}
        for name, module in self.model.named_modules():
            row = _row(name, module)
            if row is None:
                continue
            self.report.layers.append(row)
            if row.chosen == "dense":
                row.reason = _why_not(name, module, row, tied, paths[id(module)])
                if not row.reason:
                    wanted[name] = row
        return wanted

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
            chain.tail = chains.find_tail(self.model, layer, found.calls)
        if row.density == 1.0 and not chain.tail:
            row.reason = "dense: it has no zeros, and nothing follows that it could take in"
            return None
        try:
            candidates, refused = build(chain, formats_for(module, self.formats, self.device))
        except ValueError as error:
            row.reason = f"dense: {error}"
            return None
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


def _row(name: str, module: nn.Module) -> ChoiceRow | None:
    """Return the row of a module that has weights, None for any other."""
    weight = module.weight if swap.is_sparse(module) else module._parameters.get("weight")
    if weight is None or weight.dim() < 2:
        return None
    density = float(torch.count_nonzero(weight.detach())) / max(1, weight.numel())
    row = ChoiceRow(name, _kind(module), density)
    if swap.is_sparse(module):
        row.chosen, row.parts = swap.format_name(module), tuple(module.parts)
        row.reason = "already sparse"
    return row


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear) or swap.dense_type(module) is nn.Linear:
        return "linear"
    if isinstance(module, nn.Conv2d) or swap.dense_type(module) is nn.Conv2d:
        return "conv"
    return type(module).__name__


def _why_not(name: str, module: nn.Module, row: ChoiceRow, tied: set[int], paths: list[str]) -> str:
    """Say why a module gets no candidates; "" where it does."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"left alone: {type(module).__name__} is not supported"
    if row.density == 1.0 and type(module) is nn.Linear:
        return "dense: it has no zeros"
    if not name:
        return "left alone: the model itself is this layer; put it into a container"
    if len(paths) > 1:
        return f"left alone: the module has several names, {', '.join(paths)}"
    reason = edit.why_not_plain(module, tied)
    if not reason and chains.has_hooks(module):
        reason = "it has hooks, which a replacement would lose"
    return f"left alone: {reason}" if reason else ""
