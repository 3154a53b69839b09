"""What shrink_ and compress_ did: rows per layer, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an aligned plain-text table; numbers are set to the right, words to the left."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    right = [
        all(not isinstance(row[i], str) for row in rows) if rows else False
        for i in range(len(headers))
    ]

    def line(values: Sequence[str]) -> str:
        parts = [
            v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(list(headers)), line(["-" * w for w in widths]), *map(line, cells)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


class Report:
    """Table and JSON of a report dataclass whose rows are in `layers`."""

    def table(self) -> str:
        """Return the rows and the notes as plain text."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Return every field as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        return self.table()


@dataclass
class ShrinkRow:
    """One layer: its units (rows or filters) and inputs before and after.

    folded  removed units whose constant output went into the followers' biases
    note    why units that could go were kept, or why the layer was left alone
    """

    name: str
    kind: str
    units_before: int
    units_after: int
    inputs_before: int
    inputs_after: int
    folded: int = 0
    note: str = ""


@dataclass
class ShrinkReport(Report):
    """What shrink_ removed, layer by layer in execution order."""

    layers: list[ShrinkRow] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def removed(self) -> int:
        """Units removed in all layers together."""
        return sum(row.units_before - row.units_after for row in self.layers)

    def table(self) -> str:
        """Return the rows, the number of parameters and the notes as plain text."""
        rows = [
            (
                row.name,
                row.kind,
                f"{row.units_before} -> {row.units_after}",
                f"{row.inputs_before} -> {row.inputs_after}",
                row.folded,
                row.note,
            )
            for row in self.layers
        ]
        lines = [format_table(["layer", "kind", "units", "inputs", "folded", "note"], rows)]
        lines.append(f"parameters: {self.parameters_before:,} -> {self.parameters_after:,}")
        return "\n".join(lines + self.notes)


@dataclass
class ChoiceRow:
    """One layer: what was chosen for it and why.

    density     non-zero weights / weights
    chosen      format name, or "dense"
    candidates  name -> median microseconds of the chain (layer and what follows in `chain`); with
                several batch sizes "name @ size"
    speedup     dense / chosen on this layer's input: the median of the paired ratios, or the ratio
                of the fastest tenths of the rounds where that is lower; 1.0 for dense
    predicted_us  name -> microseconds that the cost model expected; those far behind the best
                were not built
    cached      the times were measured earlier, for an equal layer on this machine
    by_batch    batch size -> name of what computes it, where several sizes were asked for
    chain       names of the modules that were timed together
    parts       names of the modules joined into the chosen one; empty where none were
    """

    name: str
    kind: str
    density: float
    chosen: str = "dense"
    candidates: dict[str, float] = field(default_factory=dict)
    speedup: float = 1.0
    chain: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    reason: str = ""
    predicted_us: dict[str, float] = field(default_factory=dict)
    cached: bool = False
    by_batch: dict[int, str] = field(default_factory=dict)

    def microseconds(self, name: str) -> float | None:
        """Return a candidate's median time, None where it was not measured."""
        return self.candidates.get(name)


@dataclass
class CompressReport(Report):
    """What compress_ chose, layer by layer, and the whole model measured before and after.

    dense_us, compressed_us  the whole model on the example inputs, medians of paired rounds
    speedup                  their ratio, reckoned like a layer's; None where nothing was changed
    speedups                 batch size -> the same, where several sizes were asked for
    layout                   memory layout that convolutions hand to each other; None: as they come
    """

    layers: list[ChoiceRow] = field(default_factory=list)
    dense_us: float | None = None
    compressed_us: float | None = None
    speedup: float | None = None
    speedups: dict[int, float] = field(default_factory=dict)
    layout: str | None = None
    threads: int = 0
    device: str = "cpu"
    notes: list[str] = field(default_factory=list)

    @property
    def changed(self) -> list[str]:
        """Names of the layers that are no longer dense."""
        return [row.name for row in self.layers if row.chosen != "dense"]

    def table(self) -> str:
        """Return the rows, the whole model's times and the notes as plain text."""
        rows = []
        for row in self.layers:
            times = ", ".join(_times(name, us, row) for name, us in row.candidates.items())
            joined = " + ".join(row.parts)
            rows.append(
                (
                    row.name,
                    row.kind,
                    row.density,
                    row.chosen,
                    row.speedup,
                    times,
                    joined,
                    row.reason,
                )
            )
        headers = ["layer", "kind", "density", "chosen", "speed-up", "us", "joined", "reason"]
        lines = [format_table(headers, rows)]
        if self.speedup is not None:
            lines.append(
                f"whole model: {self.dense_us:.1f} us dense, {self.compressed_us:.1f} us "
                f"compressed, {self.speedup:.2f}x ({self.threads} threads, {self.device})"
            )
        for size, ratio in self.speedups.items():
            lines.append(f"batch {size}: {ratio:.2f}x")
        if self.layout is not None:
            lines.append(f"convolutions hand over {self.layout}")
        return "\n".join(lines + self.notes)


def _times(name: str, microseconds: float, row: ChoiceRow) -> str:
    predicted = row.predicted_us.get(name)
    note = "" if predicted is None else f" (predicted {predicted:.1f})"
    return f"{name} {microseconds:.1f}{note}"
