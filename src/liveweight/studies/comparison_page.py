"""The page of the comparison: claims, tables, plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from liveweight.studies.comparison_methods import METHODS
from liveweight.studies.comparison_plots import draw
from liveweight.studies.comparison_verdicts import (
    UNITS,
    difference,
    per_seed,
    pick,
    points,
    sparsities,
    verdicts,
    which_reading,
)
from liveweight.studies.grid import Row, StudyFolder
from liveweight.studies.page import claims, spread, table

if TYPE_CHECKING:
    from liveweight.studies.comparison import ComparisonOptions

_ENDS = {"fine_tuned": "fine-tuned", "scratch": "from scratch"}


def render(rows: list[Row], options: ComparisonOptions, folder: StudyFolder) -> str:
    """Return the page's Markdown; plots are written into the folder."""
    drawn = draw(rows, folder.path)
    found = verdicts(rows)
    parts = [_intro(rows, options), "## Claims"]
    parts.append(claims(found) if found else "No claim can be judged from the cells that are done.")
    parts += [_RULE, which_reading(rows)[1]]
    for granularity, words in UNITS.items():
        if sparsities(rows, granularity):
            parts += [f"## Pruning {words}", _picture(drawn, f"{granularity}.png")]
            parts.append(_methods(rows, granularity))
    if pick(rows, method="quantization"):
        parts += ["## At equal bytes", _picture(drawn, "bytes.png"), _quantized(rows), _BYTES]
    parts += ["## Protocol", _protocol(options)]
    return "\n\n".join(part for part in parts if part)


def _picture(drawn: Sequence[str], name: str) -> str:
    return f"![accuracy]({name})" if name in drawn else ""


def _intro(rows: Sequence[Row], options: ComparisonOptions) -> str:
    dense = spread(per_seed(rows, "accuracy", method="dense").values(), scale=100)
    return (
        "Every selection method that Harang and Sanders name (Magnificent minified models, arXiv "
        "2306.10177), and NNrelief, at two granularities; each pruned net fine-tuned, and its "
        "architecture trained from scratch; beside quantization of the dense net. Only the "
        "abstract was open to us: nets, data, settings and the formulas of OBD-SD, dropout damage "
        "and merging are our definitions, and the figures are comparable with each other, not "
        f"with the paper's.\n\nDense {options.model}: {dense} % of the test samples right. All "
        "figures: mean ± standard deviation over seeds; every seed has its own data order, dense "
        "net, masks and new first weights. Accuracies are of the last epoch; nothing was chosen "
        "by the test set except where the text says so."
    )


_RULE = (
    "Differences are paired by seed and given with their standard error; a claim holds, or does "
    "not, where two standard errors leave no doubt, and is undecided else. Our line between "
    '"slightly" and "much" is 1 point of accuracy.'
)

_BYTES = (
    "Bytes are counted, not measured. Pruned weights: 4 per value kept, and for its place the "
    "smaller of a mask bit per weight and CSR's indices (2 per column, 4 per row), layer by layer. "
    "Pruned neurons: 4 per parameter of the smaller dense net. Quantized: the bits of every "
    "weight, and 2 per unit for its scale. Biases are float32 everywhere. The pruned net of a row "
    "is the best of those that are no larger, by the mean test accuracy over seeds: an optimistic "
    "choice; quantized nets were not trained on."
)


def _methods(rows: Sequence[Row], granularity: str) -> str:
    """Return the table of one granularity: sparsities by methods."""
    lines = []
    for level in sparsities(rows, granularity):
        for method in METHODS:
            place = {"method": method, "granularity": granularity, "sparsity": level}
            chosen = pick(rows, **place)
            if not chosen:
                continue
            tuned, scratch = (per_seed(rows, key, **place) for key in _ENDS)
            gap = difference(tuned, scratch)
            figures = [per_seed(rows, key, **place) for key in ("cut", *_ENDS)]
            if granularity == "weight":
                figures.append(per_seed(rows, "lottery", **place))
            kept = statistics.fmean(row["kept"] for row in chosen)
            lines.append(
                (
                    f"{level:g}",
                    method,
                    f"{kept:,.0f}",
                    *(spread(found.values(), scale=100) for found in figures),
                    points(*gap[:2]).removesuffix(" points") if gap else "-",
                )
            )
    headers = ["sparsity", "method", "weights", "cut", "fine-tuned", "from scratch"]
    if granularity == "weight":
        headers.append("first weights")
    return table([*headers, "tuned - scratch"], lines) + "\n\n" + _COLUMNS[granularity]


_COLUMNS = {
    "weight": (
        "Test accuracy in %: just after the cut; after fine-tuning; of the same mask on new first "
        "weights, trained like the dense net; of the same mask on the dense net's first weights "
        "(lottery ticket), trained so, too. `tuned - scratch`: points, ± standard error."
    ),
    "neuron": (
        "Test accuracy in %: just after the cut; after fine-tuning the smaller dense net; of a net "
        "of the same widths trained like the dense net from new first weights (equal widths and "
        "seeds are one training). `weights` are those of the smaller net. `tuned - scratch`: "
        "points, ± standard error."
    ),
}


def _quantized(rows: Sequence[Row]) -> str:
    """Return the table of bit widths, each beside the best pruned net that is no larger."""
    lines = []
    bits = sorted({row["bits"] for row in pick(rows, method="quantization")}, reverse=True)
    for width in bits:
        ours = per_seed(rows, "accuracy", method="quantization", bits=width)
        size = statistics.fmean(per_seed(rows, "bytes", bits=width).values())
        best = best_within(rows, size)
        line = [f"{width}", f"{size:,.0f}", spread(ours.values(), scale=100)]
        if best is None:
            lines.append((*line, "none is as small", "-", "-", "-"))
            continue
        theirs = per_seed(rows, best["key"], **best["place"])
        gap = difference(theirs, ours)
        place, end = best["place"], _ENDS[best["key"]]
        name = f"{place['method']}, {place['granularity']} {place['sparsity']:g}, {end}"
        line += [name, f"{best['bytes']:,.0f}", spread(theirs.values(), scale=100)]
        lines.append((*line, points(*gap[:2]).removesuffix(" points") if gap else "-"))
    headers = ["bits", "bytes", "accuracy, %", "best pruned net no larger", "its bytes"]
    return table([*headers, "accuracy, %", "pruned - quantized"], lines)


def best_within(rows: Sequence[Row], size: float) -> dict | None:
    """Return the place, key and bytes of the most accurate pruned net of at most `size` bytes."""
    found = []
    for granularity in UNITS:
        for level in sparsities(rows, granularity):
            for method in METHODS:
                place = {"method": method, "granularity": granularity, "sparsity": level}
                sizes = per_seed(rows, "bytes", **place).values()
                if not sizes or statistics.fmean(sizes) > size:
                    continue
                for key in _ENDS:
                    mean = statistics.fmean(per_seed(rows, key, **place).values())
                    entry = {"place": place, "key": key, "bytes": statistics.fmean(sizes)}
                    found.append((mean, entry))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _protocol(options: ComparisonOptions) -> str:
    scope = "in every layer alike" if options.scope == "layer" else "over all layers together"
    return (
        f"One cut of a trained dense net. Sparsity of single weights is counted {scope}; of "
        "neurons in every hidden layer alike, so that all methods leave the same widths. Criteria "
        f"look at {options.samples} training samples and, where they need them, their labels. "
        "Scores of neurons are the sums of their connections' scores. OBD and OBD-SD use the "
        f"Fisher curvature; dropout damage draws up to {options.dropout_masks} masks per layer; "
        "merging removes the neurons that magnitude would and hands their outgoing weights to the "
        "kept neuron whose activations are most like theirs; NNrelief compares neurons by their "
        f"whole load. Dense and from scratch: {options.epochs} epochs. Fine-tuning: "
        f"{options.fine_tune_epochs} epochs on top of the dense net's: what is compared is what "
        "each way reaches, not equal computing. Nothing in the settings was tuned per method."
    )
