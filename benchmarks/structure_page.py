"""The page and the plot of benchmarks/structure.py, from its JSON files alone."""

from __future__ import annotations

import json
import pathlib
import statistics

STYLES = {
    "single weights": ("#1f2933", "o", "-"),
    "blocks 16x16": ("#c2410c", "s", "--"),
    "blocks 16x16, clustered": ("#c2410c", "s", "-"),
    "blocks 32x32": ("#1d6fa5", "D", "--"),
    "blocks 32x32, clustered": ("#1d6fa5", "D", "-"),
    "blocks 64x1": ("#7b4fa3", "v", "--"),
    "blocks 64x1, clustered": ("#7b4fa3", "v", "-"),
    "V:N:M, V = 16": ("#1b7f4d", "^", "-"),
}


def label(row: dict) -> str:
    return row["structure"] + (", clustered" if row["clustered"] else "")


def line(row: dict) -> str:
    """One row for the terminal."""
    return (
        f"{row['importance']:<10}{label(row):<26}{row['sparsity']:.0%} removed, "
        f"mass {row['mass']:.1%} of {row['best_mass']:.1%}: "
        f"{row['before']:.2%} -> {row['after']:.2%}"
    )


def read(folder: pathlib.Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def groups(facts: dict, importance: str) -> dict[tuple[str, float], list[dict]]:
    """Return (label, sparsity) -> the rows of all seeds."""
    found: dict[tuple[str, float], list[dict]] = {}
    for row in facts["rows"]:
        if row["structure"] != "dense" and row["importance"] == importance:
            found.setdefault((label(row), row["sparsity"]), []).append(row)
    return found


def _percent(values: list[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.2f} to {100 * max(values):.2f})"


def _cell(rows: list[dict] | None, key: str) -> str:
    if rows is None:
        return "-"
    if key == "mass":
        means = [statistics.fmean(r[k] for r in rows) for k in ("mass", "best_mass")]
        return f"{100 * means[0]:.1f} of {100 * means[1]:.1f}"
    text = _percent([r[key] for r in rows])
    density = statistics.fmean(r["density"] for r in rows)
    asked = 1 - rows[0]["sparsity"]
    if abs(density - asked) > 0.03 * asked:
        text += f", at {100 * density:.1f} % kept"
    return text


def table(facts: dict, importance: str, key: str) -> list[str]:
    """Rows: structures; columns: sparsities."""
    found = groups(facts, importance)
    names = [n for n in STYLES if any(name == n for name, _ in found)]
    sparsities = sorted({s for _, s in found})
    head = "| masks | " + " | ".join(f"{100 * s:g} % removed" for s in sparsities) + " |"
    lines = [head, "|---|" + "--:|" * len(sparsities)]
    for name in names:
        cells = [_cell(found.get((name, s)), key) for s in sparsities]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _what_was_done(facts: dict) -> str:
    s = facts["settings"]
    seeds = len({r["seed"] for r in facts["rows"]})
    bf16 = ", bfloat16 autocast" if s["bf16"] else ""
    return (
        f"{seeds} seed{'s' if seeds > 1 else ''}; {s['train']:,} training samples, {s['epochs']} "
        f"epochs of Adam (lr {s['lr']:g}, no augmentation{bf16}). Fine-tuning, for every mask: one "
        f"pass over {s['tune_samples']:,} samples (lr {s['tune_lr']:g}). Accuracy on all "
        f"{s['test']:,} test samples. {facts['seconds'] / 60:.0f} minutes on {facts['threads']} "
        f"thread{'s' if facts['threads'] > 1 else ''}."
    )


def _section(facts: dict) -> list[str]:
    dense = [r for r in facts["rows"] if r["structure"] == "dense"]
    ignored = ", ".join(f"`{n}`" for n in facts["settings"]["ignore"])
    lines = [f"## {facts['case']}", "", _what_was_done(facts), ""]
    lines += [
        f"Dense: {_percent([r['before'] for r in dense])} %; fine-tuned in the same way: "
        f"{_percent([r['after'] for r in dense])} %. First and last layer ({ignored}) stay dense; "
        "the share removed is that of all the others.",
        "",
    ]
    for importance in facts["settings"]["importances"]:
        lines += [f"### Scores: {importance}", "", "Test accuracy, %, after fine-tuning:", ""]
        lines += [*table(facts, importance, "after"), "", "Before fine-tuning:", ""]
        lines += [*table(facts, importance, "before"), ""]
        lines += ["Kept share of the scores' sum, %, of what as many single weights hold:", ""]
        lines += [*table(facts, importance, "mass"), ""]
    return lines


HEAD = """# What structure costs in accuracy

The same scores, cut in different ways at the same density: single weights, whole blocks (outputs
x inputs; of a convolution whole kernels inside), blocks after `cluster_`, and V:N:M panels. Written
by `benchmarks/structure.py` from the JSON files beside it.

**A short comparison, not a record of what pruning can reach.** The nets are small, trained for a
few epochs, cut once, and fine-tuned for less than an epoch; longer training narrows all gaps. What
to read off is the order of the masks and about how far apart they are. Differences below the spread
of the seeds (in brackets: lowest to highest) are none; where there is one seed, no spread is known.

- "VGG-like" is a short, narrow one: 3x3 convolutions 3-80-80-160-160 with BatchNorm and three
  pools, then 2560-320-10.
- LeNet-5's second convolution is 50 x 20, too small for such blocks: it has blocks of 10x5 in all
  rows. Where the sides of a block do not divide a layer, the last blocks are smaller. A layer keeps
  at least one block; one of 32x32 is 16 % of the 80 x 80 convolution. Where what is kept over all
  layers is off by more than 3 %, the cell says how much it is.
- V:N:M, N = 2: M = 4, 8, 20 and 40 keep 50, 25, 10 and 5 %. Where M does not divide the input
  channels of a layer there is no such mask (-): LeNet-5's second convolution has 20. They choose
  at every position of a kernel anew; blocks keep or drop whole kernels.
- `cluster_` raises the kept mass. Kept mass is not accuracy: in most cells more of it is more
  accuracy, not in all.
- 10.00 % on CIFAR-10 before and after fine-tuning (11.35 % on MNIST) is a net that was cut through:
  where a layer keeps one or two blocks, the next may read none of the channels that are left, and
  the answer is a constant. `prune_` says so in its notes, but neither it nor `cluster_` looks
  across layers to avoid it. Single weights and V:N:M panels, which keep something of every row, do
  not meet it here.
- BatchNorm statistics are renewed on 1,000 training samples before the first evaluation.
- NNrelief scores every weight by itself here; its own use prunes whole kernels of convolutions,
  by mass and not by ratio.

![accuracy against weights kept](structure.png)
"""


def write(folder: pathlib.Path) -> None:
    """Write README.md and structure.png into the folder of the JSON files.

    Raises ValueError where there is none.
    """
    runs = read(folder)
    if not runs:
        raise ValueError(f"{folder}: no results; run benchmarks/structure.py first")
    lines = [HEAD]
    for facts in runs:
        lines += _section(facts)
    last = runs[-1]
    lines += [f"{last['date']}", "", "```", last["machine"], "```", ""]
    (folder / "README.md").write_text("\n".join(lines))
    draw(runs, folder / "structure.png")


def draw(runs: list[dict], path: pathlib.Path) -> None:
    """Draw accuracy over density, one panel per net and score, after and before fine-tuning."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(facts, name) for facts in runs for name in facts["settings"]["importances"]]
    figure, grid = pyplot.subplots(
        2, len(panels), figsize=(4.6 * len(panels), 7.2), squeeze=False, layout="constrained"
    )
    for column, (facts, importance) in zip(grid.T, panels, strict=True):
        for axes, key in zip(column, ("after", "before"), strict=True):
            _panel(axes, facts, importance, key)
        column[0].set_title(f"{facts['case']}\nscores: {importance}", fontsize=10)
        column[1].set_xlabel("weights kept (%), log scale")
    grid[0, 0].set_ylabel("test accuracy after fine-tuning (%)")
    grid[1, 0].set_ylabel("test accuracy before fine-tuning (%)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axes, facts: dict, importance: str, key: str) -> None:
    found = groups(facts, importance)
    for name, (colour, marker, style) in STYLES.items():
        points = sorted(
            (100 * statistics.fmean(r["density"] for r in rows),
             100 * statistics.fmean(r[key] for r in rows))
            for (label_, _), rows in found.items() if label_ == name
        )  # fmt: skip
        if points:
            fill = "full" if style == "-" else "none"
            axes.plot(
                *zip(*points, strict=True), style, color=colour, marker=marker, fillstyle=fill,
                label=name, linewidth=1.4, markersize=5,
            )  # fmt: skip
    dense = [100 * r[key] for r in facts["rows"] if r["structure"] == "dense"]
    axes.axhline(statistics.fmean(dense), color="#9aa5b1", linewidth=1, label="dense")
    axes.set_xscale("log")
    axes.set_xticks([50, 25, 10, 5], ["50", "25", "10", "5"])
    axes.minorticks_off()
    axes.set_xlim(62, 4.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e7eb", linewidth=0.8)
