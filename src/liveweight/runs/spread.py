"""Figures over seeds: mean and spread, and verdicts that are decided against the spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from liveweight.runs.report import table


def spread(values: Iterable[float], digits: int = 2, scale: float = 1.0) -> str:
    """Return mean and sample standard deviation as "97.10 ± 0.21"; "-" for none, no ± for one."""
    found = [scale * value for value in values]
    if not found:
        return "-"
    mean = f"{statistics.fmean(found):,.{digits}f}"
    return mean if len(found) == 1 else f"{mean} ± {statistics.stdev(found):,.{digits}f}"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, bool | None]:
    """Return (mean difference, its standard error, verdict) of values paired by seed.

    The verdict is True where ours is larger by more than two standard errors, False where it is
    smaller by more than two, None between, and None for a single pair.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"expected as many values on both sides, got {len(ours)}, {len(theirs)}")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return mean, float("nan"), None
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return mean, error, None if abs(mean) <= 2 * error else mean > 0


def above(values: Sequence[float], bound: float) -> bool | None:
    """Return whether values lie above a bound, each a seed's: the verdict of `paired`."""
    return paired(values, [bound] * len(values))[2]


def both(*verdicts: bool | None) -> bool | None:
    """Return whether all hold: False as soon as one does not, None where one is undecided."""
    if False in verdicts:
        return False
    return None if None in verdicts else True


@dataclass(frozen=True)
class Claim:
    """What a paper claims, what we saw, and whether it holds here (None: undecided)."""

    text: str
    seen: str
    holds: bool | None


def claims(rows: Sequence[Claim]) -> str:
    """Return a table of claims beside what was seen."""
    words = {True: "yes", False: "**no**", None: "undecided"}
    cells = [(claim.text, claim.seen, words[claim.holds]) for claim in rows]
    return table(["the paper's claim", "what we saw", "holds here"], cells)
