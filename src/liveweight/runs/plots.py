"""Plots of a run: accuracy against weights left, density per layer, latency. Needs matplotlib."""

from __future__ import annotations

import io
import pathlib

from liveweight.runs.folder import write_atomic

_COLOURS = {
    "dense": "#9aa5b1",
    "dense, torch.compile": "#5b6b7b",
    "shrunk, dense kernels": "#8fbf9f",
    "compressed": "#1b7f4d",
}
_SIZE = (6.4, 4.0)


def draw(result: dict, folder: pathlib.Path) -> list[str]:
    """Draw every plot as PNG into the folder; return the file names. ImportError: no matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    painters = {"density.png": _density}
    if len(result["iterates"]) > 1:
        painters["accuracy.png"] = _accuracy
    if result["latency"]:
        painters["latency.png"] = _latency
    for name, paint in painters.items():
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasAgg(figure)  # no pyplot: it keeps figures and needs a display's backend
        paint(result, figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        write_atomic(folder / name, buffer.getvalue())
    return list(painters)


def _clean(axes) -> None:
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
    axes.set_xscale("log")
    axes.set_xlim(min(left) / 1.4, 140)
    axes.invert_xaxis()
    ticks = [t for t in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if t >= min(left) / 1.4]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("weights left (%), log scale; each point is one iteration")
    axes.set_ylabel("accuracy (%)")
    axes.set_title("Accuracy against weights left")
    axes.legend(frameon=False, loc="best")
    _clean(axes)


def _density(result: dict, figure) -> None:
    rows = result["iterates"][result["chosen"]]["rows"]
    if len(rows) > 8:
        figure.set_figheight(1.2 + 0.28 * len(rows))
    shares = [100 * row["kept"] / row["total"] for row in rows]
    axes = figure.subplots()
    bars = axes.barh(range(len(rows)), shares, color=_COLOURS["compressed"], height=0.6)
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
    _clean(axes)
    axes.grid(False)


def _latency(result: dict, figure) -> None:
    blocks = result["latency"]
    for axes, block in zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks, strict=True):
        rows = block["rows"]
        times = [row["median_us"] for row in rows]
        colours = [_COLOURS.get(row["name"], "#9aa5b1") for row in rows]
        bars = axes.bar(range(len(rows)), times, color=colours, width=0.7)
        labels = [f"{_time(row['median_us'])}\n{row['speedup']:.2f}x" for row in rows]
        axes.bar_label(bars, labels, padding=2, fontsize=8)
        names = [row["name"].replace(", ", ",\n") for row in rows]
        axes.set_xticks(range(len(rows)), names, fontsize=7.5, rotation=30, ha="right")
        axes.set_ylim(0, 1.2 * max(times))
        axes.set_ylabel("median of one forward pass (us)")
        axes.set_title(f"batch {block['batch']}", fontsize=10)
        _clean(axes)
    figure.suptitle("Latency; x: speed-up against dense")


def _time(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"
