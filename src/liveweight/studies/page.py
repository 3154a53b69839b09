"""What the pages of studies have in common: spreads over seeds, claims, figures, the setting."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from liveweight.runs.folder import differing_keys, write_atomic
from liveweight.runs.report import percent, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from liveweight.studies.grid import Study

__all__ = ["Claim", "claims", "clean", "figure", "paired", "percent", "save", "spread", "table"]

COLOURS = ("#1b7f4d", "#c2410c", "#2563a8", "#8a5cb8", "#b08900", "#5b6b7b", "#b8325f", "#0f8b8d")
GREY = "#9aa5b1"


def spread(values: Iterable[float], digits: int = 2, scale: float = 1.0) -> str:
    """Return mean and sample standard deviation as "97.10 ± 0.21"; "-" for none, no ± for one."""
    found = [scale * value for value in values]
    if not found:
        return "-"
    mean = f"{statistics.fmean(found):.{digits}f}"
    return mean if len(found) == 1 else f"{mean} ± {statistics.stdev(found):.{digits}f}"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, bool | None]:
    """Return (mean difference, its standard error, verdict) of values paired by seed.

    The verdict is True where ours is larger by more than two standard errors, False where it is
    smaller by more than two, None between, and None for a single pair.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"expected as many values on both sides, got {len(ours)}, {len(theirs)}")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return mean, float("nan"), None
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return mean, error, None if abs(mean) <= 2 * error else mean > 0


@dataclass(frozen=True)
class Claim:
    """What a paper claims, what we saw, and whether it holds here (None: undecided)."""

    text: str
    seen: str
    holds: bool | None


def claims(rows: Sequence[Claim]) -> str:
    """Return a table of claims beside what was seen."""
    words = {True: "yes", False: "**no**", None: "undecided"}
    cells = [(claim.text, claim.seen, words[claim.holds]) for claim in rows]
    return table(["the paper's claim", "what we saw", "holds here"], cells)


def figure(width: float = 6.4, height: float = 4.0) -> Figure:
    """Return a figure without a display. ImportError: matplotlib is not installed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def clean(axes: Any) -> None:
    """Take the frame's upper and right side away and draw a quiet grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def save(made: Figure, path: pathlib.Path) -> None:
    """Write a figure as PNG."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=130)
    write_atomic(path, buffer.getvalue())


def frame(
    study: Study, options: Any, machine: dict, body: str, entries: list[dict], count: int
) -> str:
    """Return a whole page: title, what the study says, its options, machine and command."""
    plain = dataclasses.asdict(options)
    hours = sum(entry["seconds"] for entry in entries) / 3600
    state = f"{len(entries)} cells, {hours:.1f} hours of computing on {options.threads} "
    state += "thread each." if options.threads == 1 else "threads each."
    if len(entries) < count:
        state = f"**{len(entries)} of {count} cells are done.** " + state
    rows = [(key, str(value)) for key, value in [*_flat(plain), *machine.items()]]
    command = f"liveweight study {study.name}{_changed(study, plain)} --out runs/{study.name}"
    parts = [
        f"# {study.title}",
        body.strip(),
        "## Setting",
        state,
        table(["what", "setting"], rows),
        f"```\n{command}\n```",
        "Written by this command from the rows of every cell (rows.json); `liveweight report` "
        "writes it again.",
    ]
    return "\n\n".join(parts) + "\n"


def _flat(values: dict, prefix: str = "") -> list[tuple[str, object]]:
    found = []
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        found += _flat(value, f"{prefix}{key}.") if nested else [(prefix + key, _name(value))]
    return found


def _name(value: object) -> object:
    """Return a path's last part, anything else as it is."""
    return pathlib.PurePath(value).name if isinstance(value, str) and "/" in value else value


def _changed(study: Study, plain: dict) -> str:
    """Return the options that differ from the defaults, paths without their folders."""
    words = []
    for line in differing_keys(dataclasses.asdict(study.options()), plain):
        key = line.partition(": ")[0]
        value: Any = plain
        for part in key.split("."):
            value = value[part]
        text = str(_name(value)).replace(" ", "")
        words.append(f" --{key} {text}")
    return "".join(words)
