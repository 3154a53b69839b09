"""Plots of the results: speed-up over sparsity, share of the peak, whole nets."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping

from cpu.timing import geometric_mean

# Okabe and Ito's palette: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
GREY, INK = "#8A8A8A", "#222222"
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.titlesize": 11, "axes.titlelocation": "left", "lines.linewidth": 1.8,
    "figure.dpi": 100, "savefig.dpi": 130, "figure.facecolor": "white",
}  # fmt: skip


def draw(results: dict[str, dict], out: pathlib.Path) -> dict[str, str]:
    """Write the plots whose tables are there; return file name -> what it shows."""
    return draw_all(PLOTS, {name: result["rows"] for name, result in results.items()}, out)


def draw_all(
    plots: Mapping[str, tuple[Callable, str]], rows: object, out: pathlib.Path
) -> dict[str, str]:
    """Write every plot that its function makes of the rows; return file name -> what it shows.

    plots  name -> (function of pyplot and rows, which returns a figure or None; what it shows)
    """
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is missing: no plots")
        return {}
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {}
    with plt.rc_context(STYLE):
        for name, (make, text) in plots.items():
            figure = make(plt, rows)
            if figure is not None:
                figure.savefig(out / f"{name}.png", bbox_inches="tight")
                plt.close(figure)
                drawn[f"{name}.png"] = text
    return drawn


def _curves(rows: list[dict], key: str, value: object) -> dict[int, list[tuple[float, float]]]:
    """Return batch -> [(sparsity, speed-up over the strongest dense)] of one shape or layer."""
    curves: dict[int, dict[float, float]] = {}
    for row in rows:
        if row.get(key) == value and row["dense"] is not None and row["batch"] <= 128:
            curves.setdefault(row["batch"], {})[row["sparsity"]] = row["dense"]
    found = {batch: sorted(points.items()) for batch, points in sorted(curves.items())}
    return {batch: points for batch, points in found.items() if len(points) > 1}


def _spread(places: list[float], gap: float) -> list[float]:
    """Return the places moved apart just so far that labels do not touch."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for below, above in zip(order, order[1:], strict=False):
        moved[above] = max(moved[above], moved[below] + gap)
    shift = sum(moved[i] - places[i] for i in order) / max(1, len(order))
    return [place - shift for place in moved]


def _panel(axes, title: str, curves: dict[int, list[tuple[float, float]]]) -> None:
    import math

    axes.axhline(1, color=GREY, linewidth=1)
    axes.axhspan(0.01, 1, color="#F4F4F4", zorder=0)
    colours = dict(zip(curves, COLOURS, strict=False))
    ends = [math.log(points[-1][1]) for points in curves.values()]
    for (batch, points), place in zip(curves.items(), _spread(ends, 0.24), strict=True):
        x, y = zip(*points, strict=True)
        axes.plot([100 * v for v in x], y, color=colours[batch], marker="o", markersize=3)
        axes.annotate(
            f"batch {batch}", (100 * x[-1], math.exp(place)), xytext=(6, 0),
            textcoords="offset points", va="center", color=colours[batch], fontsize=9,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_yticks([0.5, 1, 2, 5, 10, 20])
    axes.set_yticklabels(["0.5x", "1x", "2x", "5x", "10x", "20x"])
    axes.minorticks_off()
    axes.set_title(title)
    axes.set_xlim(5, 100)
    axes.set_xticks([10, 30, 50, 70, 90])
    axes.set_xticklabels([f"{v} %" for v in (10, 30, 50, 70, 90)])


def speedup(plt, tables: dict[str, list[dict]]):
    """Speed-up over the strongest dense call against sparsity, one panel per layer."""
    linear = tables.get("linear", []) + tables.get("crossover", [])
    conv = tables.get("conv_kernelwise", []) + tables.get("crossover_conv", [])
    wanted = [
        ("Linear 4096x4096, single weights", _curves(linear, "shape", "4096x4096")),
        ("Linear 1024x1024, single weights", _curves(linear, "shape", "1024x1024")),
        ("3x3 conv 64 on 32x32, whole kernels", _curves(conv, "layer", "64@32x32")),
        ("3x3 conv 256 on 8x8, whole kernels", _curves(conv, "layer", "256@8x8")),
    ]
    wanted = [(title, curves) for title, curves in wanted if curves]
    if not wanted:
        return None
    lines = (len(wanted) + 1) // 2
    figure, grid = plt.subplots(
        lines, 2, figsize=(9.5, 3.4 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (title, curves) in zip(grid.flat, wanted, strict=False):
        _panel(axes, title, curves)
    for axes in list(grid.flat)[len(wanted) :]:
        axes.set_visible(False)
    values = [y for _, curves in wanted for points in curves.values() for _, y in points]
    grid[0, 0].set_ylim(0.8 * min([*values, 0.6]), 1.3 * max(values))
    grid[0, 0].annotate(
        "dense is faster", (0.98, 0.03), xycoords="axes fraction", ha="right", color=GREY,
        fontsize=9,
    )  # fmt: skip
    for axes in grid[:, 0]:
        axes.set_ylabel("speed-up over strongest dense")
    for axes in grid[-1]:
        axes.set_xlabel("weights removed")
    return figure


def roofline(plt, tables: dict[str, list[dict]]):
    """Share of the multiply-add peak that is useful work, at 90 %."""
    bars: list[tuple[str, float]] = []
    for table, key, what in (
        ("linear", "shape", "Linear {}, weights"),
        ("block", "block", "Linear 4096x4096, {} blocks"),
        ("conv_kernelwise", "layer", "3x3 conv {}, kernels"),
        ("conv_unstructured", "layer", "3x3 conv {}, weights"),
        ("pointwise", "layer", "conv {}, weights"),
    ):
        rows = [r for r in tables.get(table, []) if r["sparsity"] == 0.9 and r["batch"] == 32]
        bars += [(what.format(r[key]), 100 * r["peak"]) for r in rows if r.get("peak")]
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.3 * len(bars)), layout="constrained")
    names, shares = zip(*bars, strict=True)
    places = range(len(bars))[::-1]
    axes.barh(places, [100] * len(bars), color="#F0F0F0", height=0.72)
    axes.barh(places, shares, color=COLOURS[0], height=0.72)
    for place, share in zip(places, shares, strict=True):
        inside = share > 12
        axes.text(
            share + (-1 if inside else 1), place, f"{share:.0f} %", va="center",
            ha="right" if inside else "left", color="white" if inside else INK, fontsize=9,
        )  # fmt: skip
    axes.set_yticks(places, names)
    axes.set_xlim(0, 100)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title("Useful work at 90 % sparsity, batch 32, as a share of one core's peak")
    return figure


def nets(plt, tables: dict[str, list[dict]]):
    """Speed-up of whole nets over the best dense, by sparsity, one thread."""
    rows = [row for row in tables.get("nets", []) if row["threads"] == 1]
    groups: dict[str, dict[float, float]] = {}
    for row in rows:
        what = ", weights" if row["net"] == "VGG-like" and row["granularity"] == "weight" else ""
        label = f"{row['net']}{what}, batch {row['batch']}"
        groups.setdefault(label, {})[row["sparsity"]] = row["dense"]
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.32 * len(groups)), layout="constrained")
    shades = {0.8: "#9CCBE8", 0.9: "#0072B2", 0.95: "#003B5C"}
    for place, points in enumerate(reversed(groups.values())):
        x = [points[s] for s in sorted(points)]
        axes.plot([min(x), max(x)], [place, place], color="#D5D5D5", linewidth=3, zorder=1)
        for sparsity, value in points.items():
            axes.scatter(value, place, s=42, color=shades.get(sparsity, COLOURS[0]), zorder=2)
    top = len(groups) - 1
    # Named where the points stand farthest apart.
    spread = [min(g.values()) / max(g.values()) / len(g) for g in groups.values()]
    widest = spread.index(min(spread))
    for sparsity, value in list(groups.values())[widest].items():
        axes.annotate(
            f"{100 * sparsity:.0f} %", (value, top - widest), xytext=(0, 8),
            textcoords="offset points", ha="center", fontsize=9,
            color=shades.get(sparsity, COLOURS[0]),
        )  # fmt: skip
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(range(len(groups)), list(reversed(groups)))
    axes.set_ylim(-0.6, top + 0.9)
    axes.set_xscale("log")
    ticks = [t for t in (0.5, 1, 2, 3, 5, 8, 12, 20) if t < 1.3 * max(r["dense"] for r in rows)]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.tick_params(axis="y", length=0)
    mean = geometric_mean(r["dense"] for r in rows if r["sparsity"] == 0.9)
    axes.set_title(
        f"Whole nets on one core over the best dense (geometric mean at 90 %: {mean:.1f}x)"
    )
    return figure


PLOTS = {
    "speedup": (speedup, "Speed-up over the strongest dense call against sparsity, per batch"),
    "roofline": (roofline, "Useful work at 90 % sparsity as a share of the multiply-add peak"),
    "nets": (nets, "Whole nets on one core, compressed over the best dense"),
}
