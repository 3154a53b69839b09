"""The page of the study of hyper and hypo units: tables, a plot and what they say of the claims."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from liveweight.studies.grid import Row, StudyFolder
from liveweight.studies.page import (
    COLOURS,
    GREY,
    Claim,
    claims,
    clean,
    figure,
    paired,
    save,
    spread,
    table,
)

SEEN, CLEAN = "training speakers", "unseen speakers"
SETS = ("hypo", "hyper", "both", "random")
_REMOVED = tuple(f"without {name}" for name in SETS)
_ADAPTED = ("blind", "selective", "selective, random")
_LINES = (
    ("before", "as trained", GREY, "o"),
    ("without both", "without hyper and hypo units", COLOURS[3], "v"),
    ("blind", "blind adaptation", COLOURS[2], "s"),
    ("selective, random", "selective, random units", COLOURS[1], "^"),
    ("selective", "selective adaptation", COLOURS[0], "D"),
)
_BABBLE = "Babble is six voices of training speakers at once. "
_ABOUT = """
Mitra and Franco (arXiv 2001.01755) call units of an acoustic model *hyper* where they are mostly
active and *hypo* where they are barely active, remove them, and adapt them first to speech that is
out of domain. Only the abstract is public; definitions, the net and all settings here are ours.

A net of three convolutions and two hidden fully connected layers learns spoken digits from all
speakers but two ({epochs} epochs) and hears those two, clean and in noise; {folds} of speakers
{are} held back in turn. {babble}{units}
Rates are taken over the recordings that the net learned from, after ReLU, in {layers}.

* **Removal** sets the units to zero; nothing is trained afterwards. *Random*: as many units of
  each layer, drawn at random.
* **Adaptation** hears one half of the unseen speakers' recordings (even takes) in the same noise,
  without labels. Labels are the net's own where the probabilities of its two best classes are more
  than {margin} apart. *Blind* trains the whole net for {total} epochs; *selective* trains first
  the found units' weights, in and out, for {first} and then the whole net for {second};
  *selective, random* does so with as many units at random.
* **Errors** of unseen speakers are measured on the other half (odd takes), before and after."""
_RULE = """
Differences are paired by net, one for each seed and pair of unseen speakers, each averaged over the
conditions that are named; ± is their standard error. Undecided: within two of them."""
_ERRORS = """
Error in percent: the mean over the pairs of unseen speakers, then mean ± standard deviation over
the seeds. Training speakers: their takes 0 to 4, which the net did not learn from."""
_UNITS = """
Means over the nets: units in all, hypo and hyper as removed and adapted here, and for comparison
those never active and those beyond fixed rates."""


def write(rows: list[Row], options: Any, folder: StudyFolder) -> str:
    """Return the body of the page and draw its plot into the folder."""
    parts = [_about(options).strip(), "## What the paper claims", claims(verdicts(rows))]
    parts += ["## What we asked besides", _questions(rows), _RULE.strip()]
    parts += ["## Errors", _errors(rows), _ERRORS.strip()]
    if any(row["noise"] for row in rows):
        try:
            _draw(rows, folder)
            parts.append("![Error against the signal-to-noise ratio](error.png)")
        except ImportError:
            folder.note("no plots: matplotlib is not installed (pip install 'liveweight[plots]')")
    parts += ["## Units", _units(rows), _UNITS.strip()]
    return "\n\n".join(parts)


def _about(options: Any) -> str:
    limits = f"{options.low:g} and {options.high:g}"
    units = (
        f"Hypo and hyper are the units at or beyond the quantiles {limits} of their layer's firing "
        "rates, so that both are there in every layer."
        if options.percentile
        else f"Hypo and hyper are the units whose firing rates are at or beyond {limits}."
    )
    first, second = options.adapt_epochs
    return _ABOUT.format(
        epochs=options.epochs,
        folds="one pair" if len(options.folds) == 1 else f"{len(options.folds)} pairs",
        are="is" if len(options.folds) == 1 else "are",
        babble=_BABBLE if "babble" in options.noises else "",
        units=units,
        layers="the hidden fully connected layers" if options.layers == "linear" else "all layers",
        margin=f"{options.margin:g}",
        total=first + second,
        first=first,
        second=second,
    )


def verdicts(rows: Sequence[Row]) -> list[Claim]:
    """Return the paper's claims beside what was seen, clean and in noise."""
    found = []
    for where, fits in _places(rows):
        for name, words in (
            ("hypo", "hypo units"),
            ("hyper", "hyper units"),
            ("both", "hyper and hypo units"),
        ):
            text = f"Removing {words} improves recognition out of domain: {where}"
            found.append(_compare(text, rows, fits, "before", f"without {name}"))
        text = f"Selective adaptation is better than blind adaptation: {where}"
        found.append(_compare(text, rows, fits, "blind", "selective"))
    return found


def _questions(rows: Sequence[Row]) -> str:
    words = {True: "yes", False: "**no**", None: "undecided"}
    lines = []
    for where, fits in _places(rows):
        for text, worse, better in (
            ("Does blind adaptation help", "before", "blind"),
            ("Does selective adaptation help", "before", "selective"),
            ("Do the found units serve it better than random ones", _ADAPTED[2], "selective"),
            ("Is less lost without them than without random ones", _REMOVED[3], "without both"),
        ):
            claim = _compare(f"{text}: {where}?", rows, fits, worse, better)
            lines.append((claim.text, claim.seen, words[claim.holds]))
    return table(["question", "what we saw", "answer"], lines)


def _places(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], bool]]]:
    places = [
        ("unseen speakers", lambda row: row["condition"] == CLEAN),
        ("unseen speakers in noise", lambda row: bool(row["noise"])),
    ]
    return [(name, fits) for name, fits in places if any(map(fits, rows))]


def _compare(
    text: str, rows: Sequence[Row], fits: Callable[[Row], bool], worse: str, better: str
) -> Claim:
    """Claim that the errors `better` are below the errors `worse`, paired by net."""
    nets = sorted({(row["seed"], row["fold"]) for row in rows if fits(row)})
    pairs = []
    for net in nets:
        mine = [r["errors"] for r in rows if fits(r) and (r["seed"], r["fold"]) == net]
        pairs.append([100 * statistics.fmean(e[name] for e in mine) for name in (worse, better)])
    before, after = zip(*pairs, strict=True)
    mean, standard_error, holds = paired(before, after)
    seen = f"{statistics.fmean(before):.2f} % {worse}, {statistics.fmean(after):.2f} % {better}: "
    seen += f"{abs(mean):.2f} points {'less' if mean > 0 else 'more'}"
    if len(pairs) > 1:
        seen += f" (± {standard_error:.2f}, {len(pairs)} nets)"
    return Claim(text, seen, holds)


def _errors(rows: Sequence[Row]) -> str:
    names = ("before", *_REMOVED, *_ADAPTED)
    lines = []
    for condition in dict.fromkeys(row["condition"] for row in rows):
        here = [row for row in rows if row["condition"] == condition]
        lines.append((condition, *(spread(by_seed(here, name), 1, 100) for name in names)))
    return table(["condition", *names], lines)


def by_seed(rows: Sequence[Row], name: str) -> list[float]:
    """Return the error under that name, averaged over everything but the seed; [] for none."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if name in row["errors"]:
            found.setdefault(row["seed"], []).append(row["errors"][name])
    return [statistics.fmean(values) for values in found.values()]


def _units(rows: Sequence[Row]) -> str:
    nets = list({(row["seed"], row["fold"]): row["units"] for row in rows}.values())
    kinds = [kind for kind in nets[0] if kind != "layer"]
    lines = []
    for i, layer in enumerate(nets[0]["layer"]):
        means = (statistics.fmean(units[kind][i] for units in nets) for kind in kinds)
        lines.append((layer, *(f"{mean:.4g}" for mean in means)))
    return table(["layer", *kinds], lines)


def _draw(rows: Sequence[Row], folder: StudyFolder) -> None:
    noises = list(dict.fromkeys(row["noise"] for row in rows if row["noise"]))
    made = figure(4.6 * len(noises) + 0.6, 4.2)
    panels = made.subplots(1, len(noises), sharey=True, squeeze=False)[0]
    for axes, noise in zip(panels, noises, strict=True):
        quiet = [r["condition"] for r in rows if r["condition"] == CLEAN]
        loud = sorted({(-r["snr"], r["condition"]) for r in rows if r["noise"] == noise})
        names = [*dict.fromkeys(quiet), *(condition for _, condition in loud)]
        for name, label, colour, marker in _LINES:
            seeds = [by_seed([r for r in rows if r["condition"] == c], name) for c in names]
            axes.errorbar(
                range(len(names)),
                [100 * statistics.fmean(values) for values in seeds],
                [100 * statistics.stdev(v) if len(v) > 1 else 0 for v in seeds],
                label=label,
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.4,
                elinewidth=0.8,
            )
        axes.set_xticks(range(len(names)), [_tick(name, noise) for name in names])
        axes.set_title(f"{noise} noise" if noise == "white" else noise)
        clean(axes)
    panels[0].set_ylabel("error on two unseen speakers (%)")
    made.supxlabel("signal-to-noise ratio", fontsize=10)
    panels[0].legend(frameon=False, fontsize=8)
    save(made, folder.path / "error.png")


def _tick(condition: str, noise: str) -> str:
    return "clean" if condition == CLEAN else condition.removeprefix(f"{noise} ")
