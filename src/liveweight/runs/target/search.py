"""The least sparsity whose cost meets a target, in few trials of a cost that may be noisy."""

from __future__ import annotations

import math


def falling(costs: list[float]) -> list[float]:
    """Return the sequence that never rises and lies nearest to the costs (least squares).

    More zeros never cost more, so a rise is noise: neighbours that rise are replaced by their mean
    (pool adjacent violators; Ayer, Brunk, Ewing, Reid, Silverman, 1955).
    """
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for cost in costs:
        mean, count = cost, 1
        while pools and pools[-1][0] < mean:
            before, many = pools.pop()
            mean = (before * many + mean * count) / (many + count)
            count += many
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


class Search:
    """Asks for the cost at one sparsity after another: `while (s := search.ask()) is not None`.

    target      cost to get down to
    dense       cost of the dense model; at sparsity 0 the cost may be lower, where the model was
                pruned before or compressing alone makes it faster
    highest     sparsity beyond which nothing is tried
    tolerance   a cost in [(1 - tolerance) target, target] is near enough
    most        trials at most
    resolution  sparsities closer than this count as one
    first       where to start, e.g. what a cost model expects; None: 1 - target / dense

    Between two trials the cost is taken to be a power of the density, a straight line of
    logarithms: exact where it counts weights or, with whole units, products of them. The next trial
    is where that line meets the target; where the one before did not halve the gap, where the line
    through the last two on its side does; then the middle of the gap. Where a cost rises with
    sparsity, the costs made `falling` decide what encloses the target.
    """

    def __init__(
        self,
        target: float,
        dense: float,
        *,
        highest: float = 0.99,
        tolerance: float = 0.02,
        most: int = 20,
        resolution: float = 1e-4,
        first: float | None = None,
    ) -> None:
        self.target, self.dense = target, dense
        self.tolerance, self.most, self.resolution = tolerance, most, resolution
        guess = 1.0 - target / dense if first is None else first
        self.highest = highest
        self._first = min(max(guess, 0.0), highest)
        self._costs: dict[float, float] = {}
        self._limit: float | None = None  # from here on the model is unusable
        self._width, self._slow = math.inf, 0
        self._last = 0.0
        self.stopped = ""

    @property
    def count(self) -> int:
        """Trials so far, unusable ones included."""
        return len(self._costs)

    @property
    def best(self) -> float | None:
        """The least sparsity that met the target, None where none did."""
        fits = self._fitted()
        met = [s for s, fit in fits.items() if fit <= self.target and self._costs[s] <= self.target]
        return min(met, default=None)

    def tell(self, sparsity: float, cost: float) -> None:
        """Take the cost at a sparsity; math.inf for a model that is unusable there and beyond."""
        self._costs[sparsity], self._last = cost, sparsity
        if math.isinf(cost):
            self._limit = sparsity if self._limit is None else min(self._limit, sparsity)

    def ask(self) -> float | None:
        """Return the sparsity to try next, None where the search is over; `stopped` says why."""
        best = self.best
        if best == 0.0:
            return self._stop("nothing more has to go")
        if best is not None and self._costs[best] >= (1.0 - self.tolerance) * self.target:
            return self._stop(f"within {100 * self.tolerance:g}% of the target")
        if self.count >= self.most:
            return self._stop(f"after {self.count} trials, the most that were allowed")
        if not self._costs:
            return self._first
        return self._without_a_bracket() if best is None else self._inside(best)

    def _fitted(self) -> dict[float, float]:
        usable = sorted(s for s, cost in self._costs.items() if math.isfinite(cost))
        fits = falling([self.dense, *(self._costs[s] for s in usable)])[1:]
        return dict(zip(usable, fits, strict=True))

    def _low(self, below: float) -> tuple[float, float]:
        """Return the sparsest usable trial below a sparsity that misses the target, and its fit."""
        missed = [(s, f) for s, f in self._fitted().items() if s < below and f > self.target]
        return max(missed, default=(0.0, self.dense))

    def _without_a_bracket(self) -> float | None:
        low, fit = self._low(math.inf if self._limit is None else self._limit)
        if self._limit is None:
            if self.highest in self._costs:
                return self._stop(f"the target is out of reach at sparsity {self.highest:g}")
            # A first miss says how the cost falls; after a second one it is a matter of whether.
            guess = self._meet((0.0, self.dense), (low, fit)) if self.count == 1 else self.highest
            return guess if low < guess < self.highest else self.highest
        if self._limit - low <= self.resolution:
            return self._stop(f"beyond sparsity {low:g} nothing of the input gets through")
        return (low + self._limit) / 2

    def _inside(self, high: float) -> float | None:
        low, above = self._low(high)
        if low == 0.0 and 0.0 not in self._costs and self.count > 1:
            return 0.0  # two trials met the target: perhaps it is met with nothing pruned
        width = high - low
        if width <= self.resolution:
            return self._stop("a little less sparsity misses the target")
        self._slow = 0 if width <= self._width / 2 or math.isinf(self._width) else self._slow + 1
        self._width = width
        place = (low + high) / 2
        if self._slow % 3 == 0:
            place = self._meet((low, above), (high, self._fitted()[high]))
        elif self._slow % 3 == 1:
            place = self._meet(*self._beside(low, high))
        if not low < place < high:
            place = (low + high) / 2
        place = min(max(place, low + 0.05 * width), high - 0.05 * width)
        return None if self._repeats(place) else place

    def _beside(self, low: float, high: float) -> list[tuple[float, float]]:
        """Return the two trials next to the target on the side of the last one."""
        points = sorted({0.0: self.dense, **self._fitted()}.items())
        side = [p for p in points if (p[0] >= high if self._last >= high else p[0] <= low)]
        pair = side[:2] if self._last >= high else side[-2:]
        return pair if len(pair) == 2 else [*pair, *pair]

    def _meet(self, left: tuple[float, float], right: tuple[float, float]) -> float:
        """Return the sparsity at which the line through two trials meets the target."""
        (u, v), (x, y) = (
            (math.log(max(1.0 - s, 1e-9)), math.log(max(cost, 1e-9 * self.dense)))
            for s, cost in (left, right)
        )
        goal = math.log((1.0 - self.tolerance / 2) * self.target)
        return 1.0 - math.exp(u + (goal - v) * (x - u) / (y - v)) if y < v else math.inf

    def _repeats(self, sparsity: float) -> bool:
        if sparsity not in self._costs:
            return False
        self._stop("a little less sparsity misses the target")
        return True

    def _stop(self, why: str) -> None:
        self.stopped = why
