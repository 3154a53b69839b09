"""Whether the paper's three claims hold in a comparison, decided by differences paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from liveweight.studies.comparison_methods import METHODS, READINGS
from liveweight.studies.grid import Row
from liveweight.studies.page import Claim, paired

# Where "slightly" ends and "much" begins, in accuracy: our line, the paper's abstract draws none.
SLIGHT = 0.01
UNITS = {"weight": "single weights", "neuron": "neurons"}


def pick(rows: Sequence[Row], **where: object) -> list[Row]:
    """Return the rows that have these values; a tuple stands for any of its members."""
    allowed = {k: v if isinstance(v, tuple) else (v,) for k, v in where.items()}
    return [row for row in rows if all(row.get(k) in v for k, v in allowed.items())]


def per_seed(rows: Sequence[Row], key: str, **where: object) -> dict[int, float]:
    """Return the mean of a figure over the picked rows, by seed."""
    found: dict[int, list[float]] = {}
    for row in pick(rows, **where):
        if key in row:
            found.setdefault(row["seed"], []).append(row[key])
    return {seed: statistics.fmean(values) for seed, values in sorted(found.items())}


def difference(
    ours: dict[int, float], theirs: dict[int, float]
) -> tuple[float, float, bool | None] | None:
    """Return what page.paired says of the seeds that both have; None where there is none."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    return paired([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])


def points(mean: float, error: float) -> str:
    """Return a difference of accuracies and its standard error in percentage points."""
    spread = "" if error != error else f" ± {100 * error:.2f}"  # NaN: one seed
    return f"{100 * mean:+.2f}{spread} points"


def sparsities(rows: Sequence[Row], granularity: str) -> list[float]:
    """Return the sparsities that there are rows of, ascending."""
    return sorted({row["sparsity"] for row in pick(rows, granularity=granularity)})


def verdicts(rows: Sequence[Row]) -> list[Claim]:
    """Return the paper's claims beside what was seen, as far as there are rows for them."""
    found = []
    for granularity in UNITS:
        for level in sparsities(rows, granularity)[-1:]:
            place = {"granularity": granularity, "sparsity": level}
            found += [claim for name in READINGS if (claim := _best(rows, name, place))]
    for granularity in UNITS:
        for level in sparsities(rows, granularity):
            claim = _retraining(rows, {"granularity": granularity, "sparsity": level})
            found += [claim] if claim else []
    return found


def rivals(rows: Sequence[Row], reading: str, place: dict) -> dict[str, tuple]:
    """Return reading minus rival, fine-tuned, for each method that is not OBD-SD."""
    ours = per_seed(rows, "fine_tuned", method=reading, **place)
    found = {}
    for name in METHODS:
        theirs = per_seed(rows, "fine_tuned", method=name, **place)
        if name not in READINGS and (gap := difference(ours, theirs)):
            found[name] = gap
    return found


def _best(rows: Sequence[Row], reading: str, place: dict) -> Claim | None:
    """OBD-SD is best: yes where it beats every rival, no where any rival beats it."""
    gaps = rivals(rows, reading, place)
    if not gaps:
        return None
    strongest = min(gaps, key=lambda name: gaps[name][0])
    mean, error, _ = gaps[strongest]
    results = [verdict for _, _, verdict in gaps.values()]
    holds = False if False in results else True if all(results) else None
    what = f"{UNITS[place['granularity']]}, sparsity {place['sparsity']:g}"
    ours = statistics.fmean(per_seed(rows, "fine_tuned", method=reading, **place).values())
    return Claim(
        "OBD-SD slightly outperforms all other selection methods at substantial pruning "
        f"({what}; reading {reading.removeprefix('obd_sd-')})",
        f"{100 * ours:.2f} % after fine-tuning; {points(mean, error)} against the strongest "
        f"other, {strongest}",
        holds,
    )


def _retraining(rows: Sequence[Row], place: dict) -> Claim | None:
    """Fine-tuning against training from scratch, the mean over the methods but random."""
    place = place | {"method": tuple(name for name in METHODS if name != "random")}
    tuned, scratch = (per_seed(rows, key, **place) for key in ("fine_tuned", "scratch"))
    gap = difference(tuned, scratch)
    if gap is None:
        return None
    mean, error, _ = gap
    seen = f"fine-tuned minus scratch {points(mean, error)}, mean over the methods but random"
    level = f"sparsity {place['sparsity']:g}"
    if place["granularity"] == "weight":
        text = f"single weights: fine-tuning is slightly better than from scratch ({level})"
        return Claim(text, seen, _within(mean, error, 0.0, SLIGHT))
    text = f"neurons: from scratch is much better than fine-tuning ({level})"
    return Claim(text, seen, _within(-mean, error, SLIGHT, 1.0))


def _within(mean: float, error: float, low: float, high: float) -> bool | None:
    """Say whether a mean lies in [low, high]; None where two standard errors leave it open."""
    if error != error:
        return None
    if low <= mean - 2 * error and mean + 2 * error <= high:
        return True
    return False if mean + 2 * error < low or mean - 2 * error > high else None


def which_reading(rows: Sequence[Row]) -> tuple[str | None, str]:
    """Return the reading of OBD-SD that shows the claim best, and why; None where none is ahead.

    Both are compared after fine-tuning at the highest sparsity of each granularity, the mean over
    the granularities, paired by seed.
    """
    places = [
        {"granularity": g, "sparsity": sparsities(rows, g)[-1]}
        for g in UNITS
        if sparsities(rows, g)
    ]
    sides = []
    for reading in READINGS:
        chosen = [row for place in places for row in pick(rows, method=reading, **place)]
        sides.append(per_seed(chosen, "fine_tuned"))
    gap = difference(*sides)
    if gap is None:
        return None, "The readings of OBD-SD were not both run."
    mean, error, ahead = gap
    first, second = (name.removeprefix("obd_sd-") for name in READINGS)
    better = None if ahead is None else first if ahead else second
    shown = [
        name
        for name, reading in zip((first, second), READINGS, strict=True)
        if all(claim.holds for place in places if (claim := _best(rows, reading, place)))
    ]
    words = f"{first} minus {second}: {points(mean, error)} at the highest sparsities"
    verdict = f"{better} is the better reading" if better else "neither reading is ahead"
    claim = f"the claim shows under {' and '.join(shown)}" if shown else "neither shows the claim"
    return better, f"{words}; {verdict}, and {claim}."
