"""When to prune and how far: schedules as plain functions of the training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from liveweight._check import check_fraction


class Schedule(Protocol):
    """Says at which steps of a training run to prune, and to which sparsity.

    at(step)  the sparsity to reach after optimizer step `step` (1, 2, ...), None: leave it
    last      the step of the last pruning
    """

    def at(self, step: int) -> float | None: ...

    @property
    def last(self) -> int: ...


def _check_step(owner: str, **steps: int) -> None:
    for name, value in steps.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {name} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True)
class OneShot:
    """Prune once, after step `step`, to `sparsity`."""

    sparsity: float
    step: int = 1

    def __post_init__(self) -> None:
        check_fraction("OneShot: sparsity", self.sparsity)
        _check_step("OneShot", step=self.step)

    def at(self, step: int) -> float | None:
        """Return the sparsity at the one step."""
        return self.sparsity if step == self.step else None

    @property
    def last(self) -> int:
        return self.step


@dataclass(frozen=True)
class Iterative:
    """Prune `times` times, `every` steps apart, the same share of what is left each time.

        s_i = 1 - (1 - final)^(i / times)    at steps every, 2 every, ...

    Source: Frankle, Carbin, "The lottery ticket hypothesis", ICLR 2019.
    """

    final: float
    times: int
    every: int

    def __post_init__(self) -> None:
        check_fraction("Iterative: final", self.final)
        _check_step("Iterative", times=self.times, every=self.every)

    def at(self, step: int) -> float | None:
        """Return the sparsity after each of the equal stretches."""
        turn, rest = divmod(step, self.every)
        if rest or not 1 <= turn <= self.times:
            return None
        return 1.0 - (1.0 - self.final) ** (turn / self.times)

    @property
    def last(self) -> int:
        return self.times * self.every


@dataclass(frozen=True)
class Cubic:
    """Raise the sparsity from `initial` to `final` between two steps, fast first, then slowly.

        s_t = final + (initial - final) (1 - (t - begin) / (end - begin))^3,  every `every` steps

    Source: Zhu, Gupta, "To prune, or not to prune", arXiv 1710.01878.
    """

    final: float
    begin: int
    end: int
    every: int = 100
    initial: float = 0.0

    def __post_init__(self) -> None:
        for name in ("final", "initial"):
            check_fraction(f"Cubic: {name}", getattr(self, name))
        _check_step("Cubic", begin=self.begin, end=self.end, every=self.every)
        if self.end < self.begin or self.initial > self.final:
            raise ValueError(
                f"Cubic: expected begin <= end and initial <= final, got {self.begin}, {self.end} "
                f"and {self.initial}, {self.final}"
            )

    def at(self, step: int) -> float | None:
        """Return the sparsity at every `every`-th step from begin on, and at end."""
        inside = self.begin <= step <= self.end
        if not inside or ((step - self.begin) % self.every and step != self.end):
            return None
        left = (self.end - step) / max(1, self.end - self.begin)
        return self.final + (self.initial - self.final) * left**3

    @property
    def last(self) -> int:
        return self.end


@dataclass(frozen=True)
class Then:
    """One schedule, and its last sparsity again every `every` steps until step `until`.

    For masks that are redrawn to the end of training (Pruner(regrow=True)).
    """

    first: Schedule
    every: int
    until: int

    def __post_init__(self) -> None:
        _check_step("Then", every=self.every, until=self.until)

    def at(self, step: int) -> float | None:
        """Return what the first schedule says, then its last sparsity."""
        if step <= self.first.last:
            return self.first.at(step)
        again = step <= self.until and (step - self.first.last) % self.every == 0
        return self.first.at(self.first.last) if again else None

    @property
    def last(self) -> int:
        return max(self.first.last, self.until)
