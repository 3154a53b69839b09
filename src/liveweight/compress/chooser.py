"""Choosing for one layer: predict, build what has a chance, measure, or remember."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liveweight import _graph
from liveweight.compress import chains, compiled, packing
from liveweight.compress.batches import resize
from liveweight.compress.cache import ChoiceCache, machine_key
from liveweight.compress.candidates import Candidate, Plan, build, formats_for, plans
from liveweight.compress.chains import Chain, Sample
from liveweight.compress.combine import combine
from liveweight.compress.cost_model import HOPELESS_BEYOND, CostModel
from liveweight.compress.decide import Verdict, decide
from liveweight.compress.measure import BUSY_NOTE, Timings
from liveweight.compress.replacement import Replacement
from liveweight.compress.report import ChoiceRow, CompressReport
from liveweight.compress.work import work_of

# A candidate this many times slower in its warm-up is not measured any further.
GIVE_UP_BEYOND = 8.0
# A packed dense layer that reaches this share of the dense one's speed is no clear loss: inside the
# model, where other layers empty the caches, it may be the faster one.
TIE = 0.9


@dataclass
class Settings:
    """What one call of compress_ goes by."""

    formats: tuple[str, ...]
    threshold: float
    device: torch.device
    own_batch: int
    batch_sizes: tuple[int, ...]
    budget_s: float
    measure: Callable[..., Timings]
    cost_model: CostModel | None
    cache: ChoiceCache
    compiles: bool = False  # what beats a dense layer must beat torch.compile of it

    def time(self, calls: dict, budget: float, notes: list[str], **options: object) -> Timings:
        """Measure calls with a multiple of the budget; note where the machine was busy."""
        options |= {"budget_s": budget * self.budget_s, "device": self.device}
        timings = self.measure(calls, **options)
        for note in (BUSY_NOTE if timings.busy else "", timings.note):
            if note and note not in notes:
                notes.append(note)
        return timings


class Chooser:
    """Chooses for the layers of one model, one after the other.

    ties  packed dense layers about as fast alone as what was chosen: the layer as it is, or joined
    """

    def __init__(self, model: nn.Module, settings: Settings, report: CompressReport) -> None:
        self.model = model
        self.settings = settings
        self.report = report
        self.machine = machine_key(torch.get_num_threads(), settings.device)
        self.ties: list[Replacement] = []

    def choose(
        self, name: str, row: ChoiceRow, found: Sample, layer: _graph.Layer | None
    ) -> Replacement | None:
        """Fill the row; return the change to make, None where the layer stays."""
        if not found.inputs.get(name):
            never = name not in found.calls
            row.reason = "never runs on the example inputs" if never else "takes no single tensor"
            return None
        chain = Chain(name, self.model.get_submodule(name), found.inputs.pop(name)[0])
        if found.calls[name] == 1:
            chain.tail = chains.find_tail(self.model, layer, found, chain.x, self.report.notes)
        try:
            wanted = self._plans(chain, row.density)
        except ValueError as error:
            row.reason = f"dense: {error}"
            return None
        row.chain = chain.names
        inputs = self._inputs(chain.x)
        verdicts, candidates, refused = self._find_verdicts(chain, wanted, inputs, row)
        if not verdicts:
            row.reason = "dense: " + "; ".join(refused)
            return None
        choice = combine(chain, verdicts, candidates, self.settings.own_batch)
        row.candidates = _named_by_size(verdicts, "times_us")
        row.reason = "; ".join([choice.reason, *refused, *(["cached"] if row.cached else [])])
        rows = max(work_of(chain.layer, "dense", x).rows for x in inputs.values())
        tie = _find_tie(verdicts, candidates, choice.candidate)
        self.ties += [Replacement(self.model, name, tie, row, 0.0, rows)] if tie else []
        if choice.candidate is None:
            return None
        row.chosen, row.speedup = choice.candidate.format, choice.speedup
        row.by_batch = choice.by_batch
        absorbed = choice.candidate.absorbed
        row.parts = (name, *absorbed) if absorbed else ()
        found = Replacement(self.model, name, choice.candidate, row, choice.saved_us, rows)
        if tie:
            self.ties[-1].follow(found)
        return found

    def _plans(self, chain: Chain, density: float) -> list[Plan]:
        """Return what to build for a chain; raise ValueError with the reason where it is nothing.

        A Linear without zeros has no use for a sparse format; a Conv2d may, for what it takes in.
        """
        joins = "dense" in self.settings.formats
        packs = joins and packing.fits(chain.layer, self.settings.device)
        if density < 1.0 or (chain.tail and isinstance(chain.layer, nn.Conv2d)):
            formats = formats_for(chain.layer, self.settings.formats, self.settings.device)
        elif packs or (joins and chain.tail):
            formats = []
        else:
            raise ValueError("it has no zeros")
        wanted = plans(chain, formats, packs, joins)
        if not wanted:
            raise ValueError("formats names none for it")
        return wanted

    def _inputs(self, x: Tensor) -> dict[int, Tensor]:
        """Return batch size -> the layer's input; one entry where the layer ignores the batch."""
        own = self.settings.own_batch
        sizes = self.settings.batch_sizes or (own,)
        if x.dim() == 0 or x.shape[0] % own:
            return {own: x}
        return {size: resize(x, own, size) for size in sizes}

    def _find_verdicts(
        self, chain: Chain, wanted: list[Plan], inputs: dict[int, Tensor], row: ChoiceRow
    ) -> tuple[dict[int, Verdict], list[Candidate], list[str]]:
        """Return the verdict per batch size, the candidates built, and why others were not."""
        keys = {size: self._key(chain, wanted, x, row) for size, x in inputs.items()}
        entries = {size: self.settings.cache.get(key) for size, key in keys.items()}
        if all(entries.values()):
            verdicts = {size: _read(entry) for size, entry in entries.items()}
            if all(verdicts.values()):
                labels = _labels_needed(verdicts)
                candidates, _ = build(chain, [p for p in wanted if p.label in labels])
                if labels <= {c.label for c in candidates}:
                    row.cached = True
                    return verdicts, candidates, []
        hopeful = self._predict(chain, wanted, inputs, row)
        candidates, refused = build(chain, [p for p in wanted if p.label in hopeful])
        if not candidates:
            nothing = Verdict("dense", 1.0, "dense is predicted to be the fastest by far")
            return (dict.fromkeys(inputs, nothing) if not refused else {}), [], refused
        verdicts = {}
        for size, x in inputs.items():
            verdicts[size] = self._race(chain, candidates, x, row.density)
            self.settings.cache.put(keys[size], _write(verdicts[size]))
            self._learn(chain, candidates, x, verdicts[size])
        return verdicts, candidates, refused

    def _predict(
        self, chain: Chain, wanted: list[Plan], inputs: dict[int, Tensor], row: ChoiceRow
    ) -> set[str]:
        """Return labels of the plans that may be the best at some batch size."""
        model = self.settings.cost_model
        if model is None:
            return {plan.label for plan in wanted}
        hopeful = set()
        for size, x in inputs.items():
            times = {"dense": model.predict(chain.layer, "dense", x, len(chain.tail))}
            for plan in wanted:
                name = "dense" if plan.format == packing.JOINED else plan.format
                passes = len(chain.tail) - plan.joined
                times[plan.label] = model.predict(chain.layer, name, x, passes)
            best = min(times.values())
            hopeful |= {name for name, us in times.items() if us <= HOPELESS_BEYOND * best}
            many = len(inputs) > 1
            row.predicted_us |= {(f"{n} @ {size}" if many else n): us for n, us in times.items()}
        return hopeful

    def _learn(self, chain: Chain, candidates: list[Candidate], x: Tensor, seen: Verdict) -> None:
        """Let the cost model know what alone-standing layers really took."""
        model = self.settings.cost_model
        if model is None or chain.tail:
            return
        for label, format_name in [("dense", "dense"), *((c.label, c.format) for c in candidates)]:
            if label in seen.times_us and format_name != packing.JOINED:
                model.learn(chain.layer, format_name, x, seen.times_us[label])

    def _race(
        self, chain: Chain, candidates: list[Candidate], x: Tensor, density: float
    ) -> Verdict:
        calls = {"dense": chain.dense(x), **{c.label: c.call(x) for c in candidates}}

        notes, threshold = self.report.notes, self.settings.threshold

        def measure(rivals: dict, budget: float) -> Timings:
            return self.settings.time(rivals, budget, notes, give_up_beyond=GIVE_UP_BEYOND)

        verdict = decide(lambda budget: measure(calls, budget), threshold, density)
        if self.settings.compiles:
            verdict, note = compiled.confirm(verdict, calls, measure, threshold, density)
            notes += [note] if note and note not in notes else []
        return verdict

    def _key(self, chain: Chain, wanted: list[Plan], x: Tensor, row: ChoiceRow) -> list:
        """Return what the times of a layer depend on."""
        layer = chain.layer
        names = {plan.format for plan in wanted} - {packing.LABEL, packing.JOINED}
        stored = {name: work_of(layer, name, x) for name in sorted(names)}
        shares = {name: round(100 * w.stored / max(1, w.weights)) for name, w in stored.items()}
        settings = [
            getattr(layer, name, None)
            for name in ("stride", "padding", "dilation", "groups", "padding_mode")
        ]
        tail = [repr(module) for _, module in chain.tail]
        about = [type(layer).__name__, list(layer.weight.shape), str(layer.weight.dtype), settings]
        about += [layer.bias is not None, tail, list(x.shape), list(x.stride()), str(x.device)]
        labels = [plan.label for plan in wanted]
        return [self.machine, about, labels, shares, round(100 * row.density), self._rules()]

    def _rules(self) -> list:
        predicts = self.settings.cost_model is not None
        return [self.settings.threshold, predicts, self.settings.compiles]


def _find_tie(
    verdicts: dict[int, Verdict], candidates: list[Candidate], chosen: Candidate | None
) -> Candidate | None:
    """Return the packed dense layer if it is about as fast as an unpacked one that was chosen."""
    packed = next((c for c in candidates if c.format == packing.LABEL), None)
    if packed is None or (chosen is not None and chosen.format != packing.JOINED):
        return None
    if chosen is not None and chosen.absorbed != packed.absorbed:
        return None
    times = [verdict.times_us for verdict in verdicts.values()]
    label = "dense" if chosen is None else chosen.label
    close = all(t.get(packed.label, math.inf) * TIE <= t.get(label, 0.0) for t in times)
    return packed if close else None


def _labels_needed(verdicts: dict[int, Verdict]) -> set[str]:
    if len(verdicts) == 1:
        (verdict,) = verdicts.values()
        packed = {name for name in verdict.times_us if name.startswith(packing.LABEL)}
        if verdict.winner == "dense":
            return packed
        return {verdict.winner} | (packed if verdict.winner.startswith(packing.JOINED) else set())
    return {name for v in verdicts.values() for name in v.speedups}


def _named_by_size(verdicts: dict[int, Verdict], field_name: str) -> dict[str, float]:
    """Return name -> figure; with several batch sizes "name @ size" -> figure."""
    if len(verdicts) == 1:
        return dict(getattr(next(iter(verdicts.values())), field_name))
    return {
        f"{name} @ {size}": value
        for size, verdict in verdicts.items()
        for name, value in getattr(verdict, field_name).items()
    }


def _write(verdict: Verdict) -> dict:
    return {
        "winner": verdict.winner,
        "speedup": verdict.speedup,
        "reason": verdict.reason,
        "times_us": verdict.times_us,
        "speedups": verdict.speedups,
    }


def _read(entry: dict) -> Verdict | None:
    """Return the verdict of a cache entry; None where the entry is not one."""
    try:
        verdict = Verdict(
            str(entry["winner"]),
            float(entry["speedup"]),
            str(entry["reason"]),
            {str(k): float(v) for k, v in entry["times_us"].items()},
            {str(k): float(v) for k, v in entry["speedups"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    figures = [verdict.speedup, *verdict.times_us.values(), *verdict.speedups.values()]
    known = verdict.winner == "dense" or verdict.winner in verdict.speedups
    good = all(math.isfinite(f) and f > 0 for f in figures) and set(verdict.speedups) <= set(
        verdict.times_us
    )
    return verdict if known and good and "dense" in verdict.times_us else None
