"""Plots of a run: accuracy against weights left, density per layer, latency. Needs matplotlib."""

from __future__ import annotations

import io
import pathlib
from typing import TYPE_CHECKING, Any

from liveweight.runs.folder import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "dense": "#9aa5b1",
    "dense, torch.compile": "#5b6b7b",
    "shrunk, dense kernels": "#8fbf9f",
    "compressed": "#1b7f4d",
}


def draw(result: dict, folder: pathlib.Path) -> list[str]:
    """Draw every plot as PNG into the folder; return the file names. ImportError: no matplotlib."""
    import matplotlib  # noqa: F401  no folder is made where it is missing

    folder.mkdir(exist_ok=True)
    painters = {"density.png": _density}
    if len(result["iterates"]) > 1:
        painters["accuracy.png"] = _accuracy
    if result["latency"]:
        painters["latency.png"] = _latency
    for name, paint in painters.items():
        made = figure()
        paint(result, made)
        save(made, folder / name)
    return list(painters)


def figure(width: float = 6.4, height: float = 4.0) -> Figure:
    """Return an empty figure of so many inches. ImportError: matplotlib is not installed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)  # no pyplot: it keeps figures and needs a display's backend
    return made


def save(made: Figure, path: pathlib.Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())


def clean(axes: Any) -> None:
    """Take away what carries no figure: two sides of the frame; set a faint grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _accuracy(result: dict, figure) -> None:
    rows = result["iterates"]
    left = [100 * row["kept"] / row["total"] for row in rows]
    axes = figure.subplots()
    for key, label, style in (
        ("validation_accuracy", "validation", {"marker": "o", "color": "#1b7f4d"}),
        ("test_accuracy", "test (not used to choose)", {"marker": "s", "color": "#9aa5b1"}),
    ):
        if all(key in row for row in rows):
            axes.plot(left, [100 * row[key] for row in rows], label=label, **style)
    chosen = result["chosen"]
    axes.plot(
        left[chosen],
        100 * rows[chosen]["validation_accuracy"],
        marker="o",
        markersize=14,
        fillstyle="none",
        linestyle="none",
        color="#c2410c",
        label="kept",
    )
    share_axis(axes, min(left))
    axes.set_xlabel("weights left (%), log scale; each point is one iteration")
    axes.set_ylabel("accuracy (%)")
    axes.set_title("Accuracy against weights left")
    axes.legend(frameon=False, loc="best")
    clean(axes)


def share_axis(axes: Any, smallest: float) -> None:
    """Make x a share of weights in per cent: logarithmic, from 100 down to the smallest."""
    axes.set_xscale("log")
    axes.set_xlim(smallest / 1.4, 140)
    axes.invert_xaxis()
    ticks = [t for t in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if t >= smallest / 1.4]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()


def _density(result: dict, figure) -> None:
    rows = result["iterates"][result["chosen"]]["rows"]
    if len(rows) > 8:
        figure.set_figheight(1.2 + 0.28 * len(rows))
    shares = [100 * row["kept"] / row["total"] for row in rows]
    axes = figure.subplots()
    bars = axes.barh(range(len(rows)), shares, color=COLOURS["compressed"], height=0.6)
    labels = [
        f"{share:.3g} %  ({row['kept']:,} of {row['total']:,})"
        for share, row in zip(shares, rows, strict=True)
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.7 * max(*shares, 1))  # room for the text behind the longest bar
    axes.set_xlabel("weights and biases left (%)")
    axes.set_title("Density per layer")
    clean(axes)
    axes.grid(False)


def _latency(result: dict, figure) -> None:
    blocks = result["latency"]
    for axes, block in zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks, strict=True):
        rows = block["rows"]
        times = [row["median_us"] for row in rows]
        colours = [COLOURS.get(row["name"], "#9aa5b1") for row in rows]
        bars = axes.bar(range(len(rows)), times, color=colours, width=0.7)
        labels = [f"{time_text(row['median_us'])}\n{row['speedup']:.2f}x" for row in rows]
        axes.bar_label(bars, labels, padding=2, fontsize=8)
        names = [row["name"].replace(", ", ",\n") for row in rows]
        axes.set_xticks(range(len(rows)), names, fontsize=7.5, rotation=30, ha="right")
        axes.set_ylim(0, 1.2 * max(times))
        axes.set_ylabel("median of one forward pass (us)")
        axes.set_title(f"batch {block['batch']}", fontsize=10)
        clean(axes)
    figure.suptitle("Latency; x: speed-up against dense")


def time_text(us: float) -> str:
    """Return microseconds as a short label."""
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"
