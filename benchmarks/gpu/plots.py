"""Plots of the GPU results: speed-up over the fastest dense call, and the roofline."""

from __future__ import annotations

import pathlib

from cpu.plots import COLOURS, GREY, draw_all

from gpu.page import roofline

TOKENS_SHOWN = (1, 4, 16, 64, 256)  # as many lines as there are colours


def draw(rows: list[dict], out: pathlib.Path) -> dict[str, str]:
    """Write the plots whose rows are there; return file name -> what it shows."""
    return draw_all(PLOTS, rows, out)


def curves(rows: list[dict]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return panel -> line -> [(sparsity, best ratio of ours)], of all that have sparsities."""
    best: dict[str, dict[str, dict[float, float]]] = {}
    for row in rows:
        where = row["where"]
        if row["kind"] != "ours" or "sparsity" not in where:
            continue
        if where["op"] == "block_linear":
            n, k = where["shape"]
            panel, line = f"{where['tokens']} tokens, {n}x{k}", where["block"]
        elif where["op"] == "unstructured_linear":
            n, k = where["shape"]
            panel, line = f"single weights, {n}x{k}", f"{where['tokens']} tokens"
            if where["tokens"] not in TOKENS_SHOWN:
                continue
        elif where["op"] == "kernelwise_conv2d":
            panel = f"kernels of 3x3 convolutions, {where['dtype']}"
            line = f"{where['batch']} x {where['channels']} at {where['side']}"
        elif where["op"] == "block_conv2d":
            panel = f"3x3 convolutions, {where['block']}"
            line = f"{where['batch']} x {where['channels']} at {where['side']}, /{where['stride']}"
        else:
            continue
        points = best.setdefault(panel, {}).setdefault(line, {})
        points[where["sparsity"]] = max(points.get(where["sparsity"], 0.0), row["ratio"])
    return {
        panel: {line: sorted(points.items()) for line, points in lines.items()}
        for panel, lines in best.items()
    }


def speedup(plt, rows: list[dict]):
    """Speed-up over the fastest dense call against sparsity, one panel per shape."""
    panels = curves(rows)
    if not panels:
        return None
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(4.2 * columns, 3.2 * height), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        axis.axhspan(0.05, 1, color="#F4F4F4", zorder=0)
        axis.axhline(1, color=GREY, linewidth=1)
        for colour, (line, points) in zip(COLOURS, lines.items(), strict=False):
            x, y = zip(*points, strict=True)
            axis.plot([100 * v for v in x], y, color=colour, marker="o", markersize=3, label=line)
        axis.set_yscale("log")
        axis.set_yticks([0.25, 0.5, 1, 2, 5, 10])
        axis.set_yticklabels(["0.25x", "0.5x", "1x", "2x", "5x", "10x"])
        axis.minorticks_off()
        axis.set_title(title)
        axis.legend(frameon=False, fontsize=8)
        axis.set_xlabel("sparsity, %")
    figure.tight_layout()
    return figure


def roof(plt, rows: list[dict]):
    """Useful FLOP/s against FLOPs per byte, under the roofline measured in the same run."""
    limits = roofline(rows)
    points = [r for r in rows if r["flops"] and r["bytes"] and r["group"] != "peak"]
    if not points or not all(limits.values()):
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    intensities = [r["flops"] / r["bytes"] for r in points]
    span = [min(intensities) / 2, max([*intensities, limits["compute"] / limits["memory"]]) * 2]
    ridge = limits["compute"] / limits["memory"]
    xs = sorted([*span, ridge])
    ys = [min(limits["compute"], x * limits["memory"]) / 1e12 for x in xs]
    axes.plot(xs, ys, color=GREY, linewidth=1)
    marks = dict(zip(("ours", "dense", "sparse"), COLOURS, strict=False))
    for kind, colour in marks.items():
        mine = [r for r in points if r["kind"] == kind]
        if mine:
            x = [r["flops"] / r["bytes"] for r in mine]
            y = [r["flops"] / r["median_us"] / 1e6 for r in mine]
            axes.scatter(x, y, s=14, color=colour, label=kind)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("useful FLOPs per byte")
    axes.set_ylabel("useful TFLOP/s")
    axes.legend(frameon=False)
    return figure


PLOTS = {
    "speedup": (speedup, "Speed-up over the fastest dense call against sparsity"),
    "roofline": (roof, "Useful operations per second under the measured roofline"),
}
