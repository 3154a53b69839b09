"""Layouts that neighbouring layers hand to each other, so that no copy lies between them."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from liveweight import _graph
from liveweight.compress import packing
from liveweight.compress.chooser import Settings
from liveweight.compress.inputs import ExampleInputs, detached, difference, evaluating, run
from liveweight.compress.measure import Timings
from liveweight.compress.replacement import Replacement
from liveweight.compress.report import CompressReport
from liveweight.nn import ByBatch

# A layout is taken if it makes the whole model faster by more than this factor at every batch size.
FASTER = 1.01
# Fewer samples of a convolution, or rows of a Linear's input, do not fill a vector: batch_last is
# not tried.
LEAST_BATCH = 8
AS_THEY_COME = "layouts as they come"
# A layout is measured this many times longer than a candidate.
LONGER = 2.0

Setting = dict[str, object]  # name of a layer -> value of its layout attribute


class Layouts:
    """Tries layouts on the layers that compress_ has chosen, all in place, and keeps the best."""

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
        self.modules: dict[str, list[nn.Module]] = {}
        self.rows: dict[str, int] = {}

    def choose(self, chosen: list[Replacement], graph: _graph.Graph | None) -> None:
        """Set the layouts that make the model faster than layouts as they come."""
        self.modules = {r.name: _with_layout(r.new[r.name]) for r in chosen}
        self.modules = {name: found for name, found in self.modules.items() if found}
        self.rows = {r.name: r.rows for r in chosen}
        if len(self.modules) < 2:
            return
        options = {AS_THEY_COME: dict.fromkeys(self.modules), **self._options(graph)}
        options = self._working(options)
        if len(options) < 2:
            return
        best = self._fastest(options)
        self._set(options[best])
        self.report.layout = None if best == AS_THEY_COME else best.partition(" ")[0]

    def reset(self) -> None:
        """Let every layer answer in the layout of its input again."""
        self._set(dict.fromkeys(self.modules))
        self.report.layout = None

    def _options(self, graph: _graph.Graph | None) -> dict[str, Setting]:
        """Return settings: between neighbours only, and everywhere but behind the last layer.

        A Linear knows one layout beside its own, and only between neighbours: what else reads
        its output reads row by row.
        """
        names = list(self.modules)
        inner = {n for n in names if graph and self._feeds_only_ours(graph.layers.get(n))}
        flat = {n for n in names if all(hasattr(m, "batch_last") for m in self.modules[n])}
        wide = {n for n in names if self.rows[n] >= LEAST_BATCH}
        found: dict[str, Setting] = {}
        for layout in ("channels_last", "batch_last"):
            able = set(names) - flat if layout == "channels_last" else wide
            places = {"between neighbours": inner, "throughout": set(names[:-1])}
            if layout == "channels_last":
                places["between packed neighbours"] = self._packed_inside(inner, graph)
            for note, where in places.items():
                where = (where & able) - (flat - inner)
                if layout == "batch_last" and all(map(packing.is_packed, self._of(where))):
                    continue
                setting = {n: layout if n in where else "contiguous" for n in names}
                setting |= dict.fromkeys(flat - where)
                if where and setting not in found.values():
                    found[f"{layout} {note}"] = setting
        return found

    def _packed_inside(self, inner: set[str], graph: _graph.Graph | None) -> set[str]:
        """Return the packed layers that feed only packed layers: channels_last is their own."""
        packed = {n for n in self.modules if all(map(packing.is_packed, self.modules[n]))}
        followers = {n: {f.name for f in graph.layers[n].followers} for n in inner & packed}
        return {n for n, names in followers.items() if names <= packed}

    def _of(self, names: set[str]) -> list[nn.Module]:
        return [module for name in names for module in self.modules[name]]

    def _feeds_only_ours(self, layer: _graph.Layer | None) -> bool:
        if layer is None or not layer.closed or layer.is_output or not layer.followers:
            return False
        return all(follower.name in self.modules for follower in layer.followers)

    def _working(self, options: dict[str, Setting]) -> dict[str, Setting]:
        """Return the settings with which the model computes the same: some code reads strides."""
        inputs = next(iter(self.inputs.values()))
        expected = detached(run(self.model, inputs))
        good = {}
        for name, setting in options.items():
            self._set(setting)
            try:
                words = difference(expected, run(self.model, inputs))
            except (RuntimeError, ValueError, TypeError):
                words = "it fails"
            if not words:
                good[name] = setting
        self._set(dict.fromkeys(self.modules))
        return good

    def _fastest(self, options: dict[str, Setting]) -> str:
        gains = {name: [] for name in options}
        for inputs in self.inputs.values():
            timings = self._time(options, inputs)
            for name in options:
                calm = timings.calm_speedup(name, AS_THEY_COME)
                gains[name].append(min(timings.speedup(name, AS_THEY_COME), calm))
        able = [name for name, found in gains.items() if min(found) > FASTER]
        return max(able, key=lambda name: math.prod(gains[name]), default=AS_THEY_COME)

    def _time(self, options: dict[str, Setting], inputs: ExampleInputs) -> Timings:
        def preparing(setting: Setting) -> Callable[[], None]:
            return lambda: self._set(setting)

        def call() -> object:
            return self.model(*inputs.args, **inputs.kwargs)

        prepare = {name: preparing(setting) for name, setting in options.items()}
        calls = dict.fromkeys(options, call)
        with evaluating(self.model):
            notes = self.report.notes
            return self.settings.time(calls, LONGER, notes, prepare=prepare, min_rounds=3)

    def _set(self, setting: Setting) -> None:
        for name, layout in setting.items():
            for module in self.modules[name]:
                if isinstance(getattr(module, "batch_last", None), bool):
                    module.batch_last = layout == "batch_last"
                elif packing.is_packed(module) and layout == "batch_last":
                    module.layout = None  # oneDNN has no such layout
                else:
                    module.layout = layout


def _with_layout(module: nn.Module) -> list[nn.Module]:
    """Return the module, or the forms of it by batch size, that can be told a layout."""
    forms = list(module.choices) if isinstance(module, ByBatch) else [module]
    return [m for m in forms if hasattr(m, "layout") or hasattr(m, "batch_last")]
