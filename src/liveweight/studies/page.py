"""What the pages of studies have in common: spreads over seeds, claims, figures, the setting."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from liveweight.runs.folder import differing_keys
from liveweight.runs.plots import clean, figure, save
from liveweight.runs.report import percent, table
from liveweight.runs.spread import Claim, claims, paired, spread

if TYPE_CHECKING:
    from liveweight.studies.grid import Study

__all__ = ["Claim", "claims", "clean", "figure", "paired", "percent", "save", "spread", "table"]

COLOURS = ("#1b7f4d", "#c2410c", "#2563a8", "#8a5cb8", "#b08900", "#5b6b7b", "#b8325f", "#0f8b8d")
GREY = "#9aa5b1"


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
        text = " ".join(map(str, value)) if isinstance(value, list) else str(_name(value))
        words.append(f" --{key} {text}")
    return "".join(words)
