"""The page of the burden study: accuracy and burden against sparsity, and the verdicts."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from liveweight.studies.burden_verdicts import verdicts
from liveweight.studies.grid import Row, StudyFolder
from liveweight.studies.page import COLOURS, GREY, claims, clean, figure, save, spread, table

if TYPE_CHECKING:
    from liveweight.studies.burden import BurdenOptions

NAMES = {
    "none": "neither",
    "merge": "token merging",
    "dynamic": "dynamic masks",
    "both": "both reliefs",
}
_MARKS = dict(zip(NAMES, "osD^", strict=True))
_INTRO = """\
A four-layer vision transformer is pruned by magnitude while it trains. *Burden* is how much more a
surviving connection carries than one of the same unit in a dense twin: same first weights, same
batches, same merging. Two reliefs are tried, alone and together: **token merging** (the tokens most
alike are averaged once, so that later layers see fewer) and **dynamic masks** (redrawn from the
dense weights to the end of the training, so that a removed weight may return; without them masks
only grow)."""
_COLUMNS = """\
Over the units of all pruned layers. *Burden*: mean of b_j = (load / connections left) / (the same
of the dense unit), and its 90th percentile. *Cut alone*: the mean burden of the dense twin once it
is pruned to this sparsity and not trained, since the largest weights carry more than the mean
weight already; training adds or takes away the rest. *Load*: mean load of a living unit against the
dense net's. *Gini*: how unequal the units' loads are, the dense twin's in brackets. *Error*:
||f - f_m||^2 / ||f||^2 of the network's output against the twin's. *Dead units* have no connection
left and are left out. *Returned*: share of the weights left that were dropped when the sparsity was
reached."""
_OURS = """\
The paper (Wang, Dai, Zhou, Qi, Zhou, "Exploring the neural burden in pruned models", arXiv
2407.16716) names burden, the two reliefs, the model and the data sets; its formulas and settings
are not public. Burden, base criterion, schedule, where and how much is merged, and all training
settings are our own; so is the reading of the claims.

Steps of AdamW do not shrink with the gradient, so that a dropped weight moves as fast as a kept one
and redrawn masks go on changing (*returned*). That may be what dynamic masks suffer from; other
optimizers were not tried."""


def page(rows: list[Row], options: BurdenOptions, folder: StudyFolder) -> str:
    """Return the page; draws burden.png where matplotlib is installed."""
    try:
        _draw(rows, folder)
        picture = "![Burden and accuracy against sparsity](burden.png)"
    except ImportError:
        picture = ""
    parts = [
        _INTRO,
        _recipe(options),
        claims(verdicts(rows)),
        picture,
        "## Accuracy",
        "Test accuracy in %, mean and standard deviation over seeds. The dense line of the merging "
        "columns is a dense net that merges as well.",
        _accuracies(rows),
        "## Burden",
        _COLUMNS,
        _burdens(rows),
        *_by_layer(rows),
        "## What is our own",
        _OURS,
    ]
    return "\n\n".join(part for part in parts if part)


def _recipe(options: BurdenOptions) -> str:
    return (
        f"AdamW, {options.epochs} epochs of batches of {options.batch_size}; masks drawn every "
        f"{options.every} steps along a cubic ramp from {options.begin:.0%} to {options.end:.0%} "
        f"of the training, sparsity counted {'over all layers' * (options.scope == 'global')}"
        f"{'in each layer' * (options.scope == 'layer')}; the first and the last layer stay dense. "
        f"Merging takes {options.merge:.0%} of the patch tokens after the attention of block "
        f"{options.merge_block + 1}. Burden is measured on {options.samples} samples held out of "
        f"the training; accuracy on the test set, after the last epoch."
    )


def pick(rows: list[Row], sparsity: float, relief: str) -> list[Row]:
    """Return the rows of one kind of net, one per seed."""
    return [r for r in rows if r["sparsity"] == sparsity and r["relief"] == relief]


def _sparsities(rows: list[Row]) -> list[float]:
    return sorted({row["sparsity"] for row in rows})


def dense_like(relief: str) -> str:
    """Return the relief of the dense twin: merging or none."""
    return "merge" if relief in ("merge", "both") else "none"


def _accuracies(rows: list[Row]) -> str:
    lines = []
    for sparsity in _sparsities(rows):
        line = [f"{sparsity:.3g}" if sparsity else "dense"]
        for relief in NAMES:
            found = pick(rows, sparsity, relief if sparsity else dense_like(relief))
            line.append(spread((r["accuracy"] for r in found), scale=100))
        lines.append(line)
    return table(["sparsity", *NAMES.values()], lines)


def _burdens(rows: list[Row]) -> str:
    lines = []
    for sparsity in (s for s in _sparsities(rows) if s):
        for relief, name in NAMES.items():
            found = pick(rows, sparsity, relief)
            if not found:
                continue

            def show(key: str, digits: int = 2, scale: float = 1.0, found=found) -> str:
                return spread((r[key] for r in found if r[key] is not None), digits, scale)

            gini = f"{show('gini', 3)} ({statistics.fmean(r['dense_gini'] for r in found):.3f})"
            load = spread(r["load"] / r["dense_load"] for r in found)
            error, returned = (f"{show(key, 1, 100)} %" for key in ("error", "returned"))
            line = [f"{sparsity:.3g}", name, show("burden"), show("burden_p90")]
            line += [show("burden_cut"), load, gini, error, show("dead_units", 0), returned]
            lines.append(line)
    header = ["sparsity", "relief", "burden", "90th percentile", "cut alone", "load", "Gini"]
    return table([*header, "error", "dead units", "returned"], lines)


def _by_layer(rows: list[Row]) -> list[str]:
    """Return heading and table of the layers' burdens at the highest sparsity."""
    top = _sparsities(rows)[-1]
    found = {relief: pick(rows, top, relief) for relief in NAMES}
    names = next(([layer[0] for layer in r[0]["layers"]] for r in found.values() if r), [])
    if top == 0 or not names:
        return []
    lines = []
    for i, name in enumerate(names):
        values = ([r["layers"][i][2] for r in of] for of in found.values())
        lines.append([name, *(spread(v for v in each if v is not None) for each in values)])
    text = f"Mean burden of a layer's units at sparsity {top:.3g}:"
    return ["## Layers", text, table(["layer", *NAMES.values()], lines)]


def _draw(rows: list[Row], folder: StudyFolder) -> None:
    drawn = figure(9.6, 4.0)
    left, right = drawn.subplots(1, 2)
    pruned = [s for s in _sparsities(rows) if s]
    for relief, colour in zip(NAMES, COLOURS, strict=False):
        for axes, key, scale in ((left, "burden", 1), (right, "accuracy", 100)):
            points = []
            for sparsity in pruned:
                values = [
                    scale * r[key] for r in pick(rows, sparsity, relief) if r[key] is not None
                ]
                if values:
                    points.append((sparsity, statistics.fmean(values), min(values), max(values)))
            if points:
                x, mean, low, high = zip(*points, strict=True)
                style = {"color": colour, "marker": _MARKS[relief], "label": NAMES[relief]}
                axes.plot([100 * value for value in x], mean, **style)
                axes.fill_between(
                    [100 * value for value in x], low, high, color=colour, alpha=0.15, linewidth=0
                )
    cut = [[r["burden_cut"] for r in pick(rows, s, "none")] for s in pruned]
    cut = [
        (100 * s, statistics.fmean(found)) for s, found in zip(pruned, cut, strict=True) if found
    ]
    if cut:
        left.plot(*zip(*cut, strict=True), ":", color=GREY, label="dense twin, cut alone")
    left.axhline(1.0, color=GREY, linewidth=1)
    for relief, line in (("none", "-"), ("merge", ":")):
        if found := pick(rows, 0.0, relief):
            level = 100 * statistics.fmean(r["accuracy"] for r in found)
            label = "dense" if relief == "none" else "dense, merging"
            right.axhline(level, color=GREY, linewidth=1, linestyle=line, label=label)
    left.set_ylabel("mean burden, times dense")
    right.set_ylabel("test accuracy (%)")
    for axes in (left, right):
        axes.set_xlabel("sparsity (%); bands: all seeds")
        axes.set_xticks([100 * s for s in pruned])
        clean(axes)
        axes.legend(facecolor="white", edgecolor="none", framealpha=0.9, fontsize=8)
    save(drawn, folder.path / "burden.png")
