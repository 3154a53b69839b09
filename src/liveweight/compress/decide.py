"""The rule that turns paired times into a choice: faster by more than the noise, or dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from liveweight.compress.measure import Timings, quantile

# How many times longer a close call is measured the second time.
LONGER = 3.0


@dataclass
class Verdict:
    """What one race showed.

    winner    label of the candidate to take, "dense" for none
    speedup   dense / its time
    speedups  the same of every candidate that could be taken
    """

    winner: str
    speedup: float
    reason: str
    times_us: dict[str, float] = field(default_factory=dict)
    speedups: dict[str, float] = field(default_factory=dict)


def decide(measure: Callable[[float], Timings], min_speedup: float, density: float) -> Verdict:
    """Measure the candidates, close calls again and longer, and name the winner.

    A candidate is taken if the lower quartile of its per-round speed-ups reaches min_speedup, and
    so does the ratio of the fastest tenths of the rounds; of several such, the one with the
    highest speed-up. measure(factor) times "dense" (first) and the candidates with that multiple
    of the usual budget.
    """
    timings = measure(1.0)
    labels = [name for name in timings.samples if name != "dense"]
    if any(_is_close(timings, name, "dense", min_speedup) for name in labels):
        timings = timings.merged(measure(LONGER))
    ranked = sorted(labels, key=lambda name: _speedup(timings, name, "dense"), reverse=True)
    times = {name: timings.median_us(name) for name in timings.samples}
    able = [name for name in ranked if _lower(timings, name, "dense") >= min_speedup]
    if able:
        speedups = {name: _speedup(timings, name, "dense") for name in able}
        ratio = speedups[able[0]]
        reason = f"{able[0]} is {ratio:.2f}x as fast as dense at {density:.1%} density"
        return Verdict(able[0], ratio, reason, times, speedups)
    return Verdict("dense", 1.0, _why_dense(timings, ranked[0], min_speedup, density), times)


def decide_whole(measure: Callable[[float], Timings]) -> tuple[Timings, float]:
    """Time "dense" and "compressed", a close call again; return the times and the speed-up.

    Below 1.0 the choices are undone. The median of the rounds counts and not the lower quartile:
    each layer has already been shown to be faster, and a small gain drowns in the noise of a
    large model. This is the veto against what adds up badly.
    """
    timings = measure(2.0)
    if _is_close(timings, "compressed", "dense", 1.0):
        timings = timings.merged(measure(2.0 * LONGER))
    return timings, _speedup(timings, "compressed", "dense")


def _speedup(timings: Timings, name: str, base: str) -> float:
    """The median of the paired ratios, or the ratio in calm rounds where that is lower."""
    return min(timings.speedup(name, base), timings.calm_speedup(name, base))


def _lower(timings: Timings, name: str, base: str) -> float:
    lower = quantile(timings.speedups(name, base), 0.25)
    return min(lower, timings.calm_speedup(name, base))


def _is_close(timings: Timings, name: str, base: str, threshold: float) -> bool:
    if name in timings.screened:
        return False
    upper = quantile(timings.speedups(name, base), 0.75)
    return _lower(timings, name, base) < threshold <= upper


def _why_dense(timings: Timings, best: str, min_speedup: float, density: float) -> str:
    ratio, low = _speedup(timings, best, "dense"), _lower(timings, best, "dense")
    at = f"at {density:.1%} density"
    if ratio < 1.0:
        return f"dense is faster: {best} runs at {ratio:.2f}x of its speed {at}"
    if ratio < min_speedup:
        return f"dense: {best} reaches {ratio:.2f}x {at}, below min_speedup {min_speedup:g}"
    return f"dense: {best} reaches {ratio:.2f}x {at}, but only {low:.2f}x beyond the noise"
