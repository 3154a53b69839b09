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
    levels = sparsities(rows, granularity)
    titles = {"fine_tuned": "fine-tuned", "scratch": "same masks, from scratch"}
    shared = granularity == "neuron"  # equal widths: one training from scratch for all methods
    if shared:
        titles = {"fine_tuned": ""}
    made = figure(3.0 + 3.7 * len(titles), 4.2)
    panels = made.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for method in _methods(rows, granularity):
            _line(axes, rows, key, method, granularity)
        if shared:
            means = [_mean(rows, "scratch", granularity=granularity, sparsity=s) for s in levels]
            errors = [100 * (1 - mean) for mean in means]
            axes.plot(range(len(levels)), errors, "k:", label="same widths, from scratch")
        if pick(rows, method="dense"):
            error = 100 * (1 - _mean(rows, "accuracy", method="dense"))
            axes.axhline(error, color=GREY, linestyle="--", label="dense")
        axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        axes.set_xlabel(f"sparsity of {words}")
        axes.set_title(title, fontsize=10)
        clean(axes)
    _accuracy_axis(panels[0])  # both share it
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[0].set_ylabel("test accuracy (%), log scale of the error")
    save(made, folder / f"{granularity}.png")


def _accuracy_axis(axes: Any) -> None:
    """Label an axis of errors in percent with accuracies; a log scale tells good nets apart."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [t for t in (90, 70, 50, 30, 20, 15, 10, 7, 5, 4, 3, 2.5, 2, 1.5, 1, 0.5)
             if low <= t <= high]  # fmt: skip
    axes.set_yticks(ticks, [f"{100 - t:g}" for t in ticks])
    axes.minorticks_off()
    axes.invert_yaxis()


def _methods(rows: Sequence[Row], granularity: str) -> list[str]:
    found = {row["method"] for row in pick(rows, granularity=granularity)}
    return [method for method in METHODS if method in found]


def _mean(rows: Sequence[Row], key: str, **where: object) -> float:
    return statistics.fmean(per_seed(rows, key, **where).values())


def _line(axes: Any, rows: Sequence[Row], key: str, method: str, granularity: str) -> None:
    """Draw one method's means with a standard deviation, set off a little from its neighbours."""
    names = _methods(rows, granularity)
    x, errors, spreads = [], [], []
    for i, level in enumerate(sparsities(rows, granularity)):
        place = {"method": method, "granularity": granularity, "sparsity": level}
        found = [100 * (1 - value) for value in per_seed(rows, key, **place).values()]
        if found:
            x.append(i + 0.04 * (names.index(method) - (len(names) - 1) / 2))
            errors.append(statistics.fmean(found))
            spreads.append(statistics.stdev(found) if len(found) > 1 else 0.0)
    style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2}
    axes.errorbar(x, errors, spreads, color=_COLOUR[method], label=method, **style)


def _by_bytes(rows: Sequence[Row], folder: pathlib.Path) -> None:
    made = figure(8.6, 4.6)
    axes = made.subplots()
    for granularity, marker in (("weight", "o"), ("neuron", "s")):
        for method in _methods(rows, granularity):
            chosen = pick(rows, method=method, granularity=granularity)
            named = granularity == "neuron" and pick(rows, method=method, granularity="weight")
            style = {"linestyle": "none", "markersize": 5, "color": _COLOUR[method]}
            style |= {"marker": marker, "label": None if named else method}
            ends = [
                [_point(pick(chosen, sparsity=level), key) for key in ("fine_tuned", "scratch")]
                for level in sparsities(chosen, granularity)
            ]
            axes.plot(*zip(*map(min, ends), strict=True), **style)
    bits = sorted({row["bits"] for row in pick(rows, method="quantization")})
    found = [_point(pick(rows, method="quantization", bits=width), "accuracy") for width in bits]
    axes.plot(*zip(*found, strict=True), "k^--", label="quantization")
    if dense := pick(rows, method="dense"):
        axes.plot(*_point(dense, "accuracy"), "D", color=GREY, label="dense")
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [n * 10**i for i in range(8) for n in (1, 2, 5) if low <= 1000 * n * 10**i <= high]
    axes.set_xticks([1000 * tick for tick in ticks], [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("thousand bytes, log scale; round: single weights, square: neurons")
    axes.set_ylabel("test accuracy (%), the better of both retrainings")
    _accuracy_axis(axes)
    clean(axes)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(made, folder / "bytes.png")


def _point(rows: Sequence[Row], key: str) -> tuple[float, float]:
    """Return (mean bytes, mean error in percent) of rows of one kind."""
    return _mean(rows, "bytes"), 100 * (1 - _mean(rows, key))
