"""Plots of a page over several runs: accuracy of every seed, and speed. Needs matplotlib."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from liveweight.runs.collect import Group
from liveweight.runs.plots import COLOURS, clean, figure, save, share_axis, time_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(groups: Sequence[Group], folder: pathlib.Path) -> list[str]:
    """Draw NAME-accuracy.png and NAME-speed.png of each group; return the file names."""
    names = []
    for group in groups:
        if len(group.runs[0].result["iterates"]) > 1:
            made = figure()
            _accuracy(group, made.subplots())
            names.append(f"{group.name}-accuracy.png")
            save(made, folder / names[-1])
        if group.batches:
            made = figure(max(6.4, 3.2 * len(group.batches)))
            _speed(group, made)
            names.append(f"{group.name}-speed.png")
            save(made, folder / names[-1])
    return names


def _accuracy(group: Group, axes: Any) -> None:
    colour = COLOURS["compressed"]
    runs = [
        (
            [100 * row["kept"] / row["total"] for row in run.result["iterates"]],
            [100 * row["test_accuracy"] for row in run.result["iterates"]],
            run.result["chosen"],
        )
        for run in group.runs
    ]
    for i, (left, accuracy, chosen) in enumerate(runs):
        if len(runs) > 1:
            label = "a seed" if i == 0 else None
            axes.plot(left, accuracy, color=colour, alpha=0.35, linewidth=1, label=label)
        ring = {"color": "#c2410c", "fillstyle": "none", "linestyle": "none", "markersize": 9}
        label = "kept (chosen on validation)" if i == 0 else None
        axes.plot(left[chosen], accuracy[chosen], marker="o", label=label, **ring)
    steps = range(len(runs[0][0]))
    lefts = [statistics.fmean(left[i] for left, _, _ in runs) for i in steps]
    means = [statistics.fmean(accuracy[i] for _, accuracy, _ in runs) for i in steps]
    axes.plot(lefts, means, color=colour, marker="o", label=_mean_of(runs))
    axes.axhline(means[0], color=COLOURS["dense"], linestyle="--", linewidth=1, label="dense")
    share_axis(axes, min(min(left) for left, _, _ in runs))
    axes.set_xlabel("weights left (%), log scale; each point is one iteration")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"{group.name}: accuracy against weights left")
    axes.legend(frameon=False, loc="best")
    clean(axes)


def _speed(group: Group, made: Figure) -> None:
    panels = made.subplots(1, len(group.batches), squeeze=False)[0]
    for axes, batch in zip(panels, group.batches, strict=True):
        found = [run.latency[batch] for run in group.runs]
        names = [name for name in COLOURS if all(name in rows for rows in found)]
        times = [[rows[name]["median_us"] for rows in found] for name in names]
        ratios = [statistics.fmean(rows[name]["speedup"] for rows in found) for name in names]
        means = [statistics.fmean(values) for values in times]
        error = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in times]
        colours = [COLOURS[name] for name in names]
        bars = axes.bar(range(len(names)), means, color=colours, width=0.7)
        axes.errorbar(range(len(names)), means, error, fmt="none", ecolor="#1f2933", capsize=3)
        labels = [f"{time_text(m)}\n{r:.2f}x" for m, r in zip(means, ratios, strict=True)]
        axes.bar_label(bars, labels, padding=6, fontsize=8)
        words = [name.replace(", ", ",\n") for name in names]
        axes.set_xticks(range(len(names)), words, fontsize=7.5, rotation=30, ha="right")
        axes.set_ylim(0, 1.25 * max(m + e for m, e in zip(means, error, strict=True)))
        axes.set_title(f"batch {batch}", fontsize=10)
        clean(axes)
    panels[0].set_ylabel("median of one forward pass (us)")
    made.suptitle(f"{group.name}: {_mean_of(group.runs)}; x: speed-up against dense")


def _mean_of(runs: Sequence) -> str:
    return f"mean of {len(runs)} seeds" if len(runs) > 1 else "one seed"
