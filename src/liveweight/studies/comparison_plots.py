"""The plots of the comparison: accuracy against sparsity and against bytes."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from liveweight.studies.comparison_methods import METHODS
from liveweight.studies.comparison_verdicts import UNITS, per_seed, pick, sparsities
from liveweight.studies.grid import Row
from liveweight.studies.page import COLOURS, GREY, clean, figure, save

_COLOUR = dict(zip(METHODS, COLOURS, strict=True))


def draw(rows: Sequence[Row], folder: pathlib.Path) -> list[str]:
    """Draw what there are rows for as PNG; return file names, none where matplotlib is missing."""
    try:
        figure()
    except ImportError:
        return []
    drawn = []
    for granularity, words in UNITS.items():
        if sparsities(rows, granularity):
            _by_sparsity(rows, granularity, words, folder)
            drawn.append(f"{granularity}.png")
    if pick(rows, method="quantization"):
        _by_bytes(rows, folder)
        drawn.append("bytes.png")
    return drawn


def _by_sparsity(rows: Sequence[Row], granularity: str, words: str, folder: pathlib.Path) -> None:
    made = figure(10.4, 4.2)
    panels = made.subplots(1, 2, sharey=True)
    levels = sparsities(rows, granularity)
    for axes, key, title in (
        (panels[0], "fine_tuned", "fine-tuned"),
        (panels[1], "scratch", "trained from scratch on the pruned architecture"),
    ):
        for shift, method in enumerate(METHODS):
            _line(axes, rows, key, method, granularity, levels, shift)
        dense = per_seed(rows, "accuracy", method="dense").values()
        if dense:
            axes.axhline(100 * statistics.fmean(dense), color=GREY, linestyle="--", label="dense")
        axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        axes.set_xlabel(f"sparsity of {words}")
        axes.set_title(title, fontsize=10)
        clean(axes)
    panels[0].set_ylabel("test accuracy (%)")
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(made, folder / f"{granularity}.png")


def _line(
    axes: Any,
    rows: Sequence[Row],
    key: str,
    method: str,
    granularity: str,
    levels: Sequence[float],
    shift: int,
) -> None:
    """Draw one method's means with a standard deviation, set off a little from its neighbours."""
    x, means, spreads = [], [], []
    for i, level in enumerate(levels):
        place = {"method": method, "granularity": granularity, "sparsity": level}
        found = list(per_seed(rows, key, **place).values())
        if found:
            x.append(i + 0.035 * (shift - len(METHODS) / 2))
            means.append(100 * statistics.fmean(found))
            spreads.append(100 * statistics.stdev(found) if len(found) > 1 else 0.0)
    if x:
        style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2}
        axes.errorbar(x, means, spreads, color=_COLOUR[method], label=method, **style)


def _by_bytes(rows: Sequence[Row], folder: pathlib.Path) -> None:
    made = figure(7.6, 4.6)
    axes = made.subplots()
    for granularity, marker in (("weight", "o"), ("neuron", "s")):
        for method in METHODS:
            chosen = pick(rows, method=method, granularity=granularity)
            named = granularity == "neuron" and pick(rows, method=method, granularity="weight")
            style = {"linestyle": "none", "markersize": 5, "color": _COLOUR[method]}
            style |= {"marker": marker, "label": None if named else method}
            levels = {row["sparsity"] for row in chosen}
            ends = [
                [_point(pick(chosen, sparsity=level), key) for key in ("fine_tuned", "scratch")]
                for level in levels
            ]
            if ends:
                axes.plot(*zip(*map(max, ends), strict=True), **style)
    bits = sorted({row["bits"] for row in pick(rows, method="quantization")})
    found = [_point(rows, "accuracy", method="quantization", bits=width) for width in bits]
    axes.plot(*zip(*found, strict=True), "k^--", label="quantization")
    axes.set_xscale("log")
    axes.set_xlabel("bytes, log scale; round: single weights, square: neurons")
    axes.set_ylabel("test accuracy (%), the better of both retrainings")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    clean(axes)
    save(made, folder / "bytes.png")


def _point(rows: Sequence[Row], key: str, **place: object) -> tuple[float, float]:
    """Return (mean bytes, mean accuracy in percent) of the picked rows, of which there are some."""
    found, sizes = per_seed(rows, key, **place), per_seed(rows, "bytes", **place)
    return statistics.fmean(sizes.values()), 100 * statistics.fmean(found.values())
