"""What the burden paper claims, decided by differences that are paired by seed."""

from __future__ import annotations

import itertools
import statistics

from liveweight.studies.grid import Row
from liveweight.studies.page import Claim, paired

_RELIEFS = {"merge": "token merging", "dynamic": "dynamic masks", "both": "both together"}


def verdicts(rows: list[Row]) -> list[Claim]:
    """Return the paper's claims beside what the rows show; those without rows are left out.

    A difference counts where it is more than two standard errors over the seeds.
    """
    pruned = sorted({row["sparsity"] for row in rows if row["sparsity"]})
    if not pruned:
        return []
    found = [_rises(rows, pruned), _compensates(rows, pruned[-1])]
    for relief in _RELIEFS:
        found.append(_recovers(rows, relief, pruned[-1]))
        found.append(_relieves(rows, relief, pruned[-1]))
    return [claim for claim in found if claim is not None]


def by_seed(rows: list[Row], sparsity: float, relief: str, key: str) -> dict[int, float]:
    """Return {seed: value}; a value that does not exist (no unit is left) is left out."""
    fitting = (r for r in rows if (r["sparsity"], r["relief"]) == (sparsity, relief))
    return {row["seed"]: row[key] for row in fitting if row[key] is not None}


def _compare(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, bool | None]:
    seeds = sorted(ours.keys() & theirs.keys())
    return paired([ours[s] for s in seeds], [theirs[s] for s in seeds])


def _rises(rows: list[Row], pruned: list[float]) -> Claim | None:
    """Burden rises with sparsity where masks only grow: at every step from one to the next."""
    steps = [by_seed(rows, sparsity, "none", "burden") for sparsity in pruned]
    shown = [
        f"{statistics.fmean(values.values()):.2f} at {sparsity:.3g}"
        for sparsity, values in zip(pruned, steps, strict=True)
        if values
    ]
    pairs = [(high, low) for low, high in itertools.pairwise(steps) if high.keys() & low.keys()]
    if not pairs:
        return None
    holds = [_compare(high, low)[2] for high, low in pairs]
    verdict = False if False in holds else None if None in holds else True
    return Claim("neural burden exists: it rises with sparsity", ", ".join(shown), verdict)


def _compensates(rows: list[Row], top: float) -> Claim | None:
    """What is left carries more than its choice explains: than in a dense twin that is only cut."""
    trained, cut = (by_seed(rows, top, "none", key) for key in ("burden", "burden_cut"))
    seeds = trained.keys() & cut.keys()
    if not seeds:
        return None
    holds = _compare(trained, cut)[2]
    means = [statistics.fmean(values[s] for s in seeds) for values in (trained, cut)]
    seen = f"{means[0]:.2f} at {top:.3g}, a dense net cut without training {means[1]:.2f}"
    return Claim("what is left makes up for what was removed", seen, holds)


def _recovers(rows: list[Row], relief: str, top: float) -> Claim | None:
    """A relief gives back accuracy that the plain pruned net lost, at the highest sparsity."""
    plain, eased = (by_seed(rows, top, r, "accuracy") for r in ("none", relief))
    if not plain.keys() & eased.keys():
        return None
    mean, error, holds = _compare(eased, plain)
    seen = f"{100 * mean:+.2f} points" + _plus_minus(100 * error, len(plain.keys() & eased.keys()))
    dense = by_seed(rows, 0.0, "none", "accuracy")
    if dense.keys() & plain.keys():
        lost = _compare(dense, plain)[0]
        seen += f"; the plain pruned net lost {100 * lost:.2f}"
    text = f"accuracy at high sparsity ({top:.3g}) recovers with {_RELIEFS[relief]}"
    return Claim(text, seen, holds)


def _relieves(rows: list[Row], relief: str, top: float) -> Claim | None:
    """A relief lowers the burden at the highest sparsity."""
    plain, eased = (by_seed(rows, top, r, "burden") for r in ("none", relief))
    seeds = plain.keys() & eased.keys()
    if not seeds:
        return None
    holds = _compare(plain, eased)[2]
    means = [statistics.fmean(values[s] for s in seeds) for values in (eased, plain)]
    seen = f"{means[0]:.2f}, without {means[1]:.2f}"
    return Claim(f"the burden at {top:.3g} falls with {_RELIEFS[relief]}", seen, holds)


def _plus_minus(error: float, seeds: int) -> str:
    return f" (standard error {error:.2f})" if seeds > 1 else ""
