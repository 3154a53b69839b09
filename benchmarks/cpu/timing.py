"""Paired timing of a cell's calls, warm or cold, and the row that a cell becomes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from liveweight.compress.measure import Timings

Call = Callable[[], object]

SLOT_S = 2e-3  # a warm turn repeats short calls for this long
PRIME_BELOW_S = 10e-3  # shorter calls run once before their warm turn, outside the clock
STREAM_BYTES = 128 << 20  # read and written before every cold call
TOLERANCE = 1e-5  # relative Frobenius error against float64
OURS = "liveweight"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured: fewer cells if quick, and seconds per cell, all calls together.

    known  rows of an earlier run of the same commit, which need not be measured again
    """

    quick: bool = False
    seconds: float = 0.5
    longest: float = 0.15  # seconds: a slower call is timed twice, in the warm-up alone
    min_rounds: int = 5
    max_rounds: int = 60
    peaks: Mapping[int, float] = dataclasses.field(default_factory=dict)  # threads -> GF/s
    known: tuple[dict, ...] = ()

    def find(self, labels: Mapping[str, object]) -> dict | None:
        """Return the known row with these labels, None where there is none."""
        return next((row for row in self.known if labels.items() <= row.items()), None)

    def pick(self, full: Iterable, quick: Iterable) -> tuple:
        """Return the full or the quick list."""
        return tuple(quick if self.quick else full)


@dataclasses.dataclass(frozen=True)
class Cell:
    """Calls that do the same work, ours first.

    labels  what identifies the row: shape, batch, sparsity ...
    calls   name -> call; the result is a tensor, compared with `truth` where one is given
    kinds   name -> "torch" (the plain dense call), "dense", "sparse" or "note" (only shown)
    flops   useful operations of ours: 2 x kept weights x outputs each one adds to
    tolerance  of the relative Frobenius error against the truth
    """

    labels: dict[str, object]
    calls: dict[str, Call]
    kinds: dict[str, str]
    flops: float = 0.0
    truth: Callable[[], Tensor] | None = None
    same: Callable[[object], Tensor] | None = None  # brings a result into the truth's form
    tolerance: float = TOLERANCE


@functools.cache
def _stream_buffer() -> Tensor:
    return torch.zeros(STREAM_BYTES // 4)


def flush() -> None:
    """Push what a call left in the caches out, by rewriting a large buffer."""
    _stream_buffer().add_(1.0)


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Keep Python's garbage collector from running between two clock readings."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def preemptions() -> int:
    """Return how often the scheduler has taken a core away from this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def order(names: list[str], index: int) -> list[str]:
    """Return the names rotated every second round and reversed in between."""
    start = (index // 2) % len(names)
    turned = names[start:] + names[:start]
    return turned if index % 2 == 0 else turned[::-1]


class _Turns:
    """Times single turns; knows how often each call repeats inside its turn."""

    def __init__(self, calls: Mapping[str, Call], cold: bool) -> None:
        self.calls, self.cold = calls, cold
        self.repeats: dict[str, int] = {}
        self.primed: dict[str, bool] = {}

    def once(self, name: str) -> float:
        if self.cold:
            flush()
        call = self.calls[name]
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def warm_up(self, name: str, limit_s: float) -> float:
        first = self.once(name)  # may compile, pack or allocate
        best = first if first > 2 * limit_s else self.once(name)
        spent = first + best
        for _ in range(3):
            if spent > 0.5 * limit_s:
                break
            best = min(best, self.once(name))
            spent += best
        self.repeats[name] = 1 if self.cold else max(1, math.ceil(SLOT_S / max(best, 1e-7)))
        self.primed[name] = not self.cold and best < PRIME_BELOW_S
        return best

    def turn(self, name: str) -> float:
        """Return microseconds per call."""
        call, repeats = self.calls[name], self.repeats[name]
        if self.cold:
            flush()
        elif self.primed[name]:
            call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e6 / repeats


def paired(calls: Mapping[str, Call], settings: Settings, cold: bool = False) -> Timings:
    """Time the calls in turns, in an order that rotates and is reversed every round.

    Warm: a turn repeats its call for 2 ms, after one call outside the clock. Cold: a turn is one
    call after 128 MB were rewritten. A call slower than settings.longest is not repeated.
    """
    turns = _Turns(calls, cold)
    with torch.inference_mode(), no_collector():
        first = {name: turns.warm_up(name, settings.longest) for name in calls}
        screened = frozenset(n for n, s in first.items() if s > settings.longest and n != OURS)
        names = [n for n in calls if n not in screened]
        samples: dict[str, list[float]] = {n: [] for n in names}
        start, before, rounds = time.perf_counter(), preemptions(), 0
        while rounds < settings.min_rounds or (
            rounds < settings.max_rounds and time.perf_counter() - start < settings.seconds
        ):
            for name in order(names, rounds):
                samples[name].append(turns.turn(name))
            rounds += 1
        rate = (preemptions() - before) / max(time.perf_counter() - start, 1e-3)
    samples.update({n: [first[n] * 1e6] for n in screened})
    return Timings({n: samples[n] for n in calls}, screened, rate)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want| in float64 (Frobenius norms)."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def check(cell: Cell) -> dict[str, float]:
    """Return the error of every call against the truth; raise where one is wrong."""
    if cell.truth is None:
        return {}
    truth, errors = cell.truth(), {}
    with torch.inference_mode():
        for name, call in cell.calls.items():
            if cell.kinds.get(name) == "note":
                continue  # another weight, timed beside the others for comparison
            got = call()
            errors[name] = relative_error(cell.same(got) if cell.same else got, truth)
            if not errors[name] < cell.tolerance:  # NaN fails too
                raise RuntimeError(f"{cell.labels}: {name} is wrong by {errors[name]:.1e}")
    return errors


def failure(labels: Mapping[str, object], error: Exception) -> dict:
    """Return the row of a cell that could not be measured; one bad cell must not end a table."""
    traceback.print_exception(error)
    return {**labels, "failed": f"{type(error).__name__}: {error}"}


def measure(cell: Cell, settings: Settings, cold: bool = False, threads: int = 1) -> dict:
    """Return the row of a cell, or labels and "failed" where it is wrong or breaks."""
    try:
        return measure_checked(cell, settings, cold, threads)
    except Exception as error:
        return failure(cell.labels, error)


def measure_checked(cell: Cell, settings: Settings, cold: bool, threads: int) -> dict:
    """Check a cell, time it, and return its row; every ratio is a time over ours, paired.

    Row: the labels; us: name -> median; ratios: name -> median of the paired ratios;
    torch, dense, sparse: ours against the plain torch call, the fastest dense and the fastest
    sparse call; gflops, peak: useful GF/s and their share of the measured peak.
    """
    errors = check(cell)
    timings = paired(cell.calls, settings, cold)
    ratios = {n: timings.speedup(OURS, n) for n in cell.calls if n != OURS}
    row: dict[str, object] = {**cell.labels, "threads": threads, "cold": cold}
    row["us"] = {n: timings.median_us(n) for n in cell.calls}
    row["ratios"] = ratios
    row["torch"] = _fastest(ratios, cell.kinds, ("torch",))
    row["dense"] = _fastest(ratios, cell.kinds, ("torch", "dense"))
    row["sparse"] = _fastest(ratios, cell.kinds, ("sparse",))
    if cell.flops:
        row["gflops"] = cell.flops / timings.median_us(OURS) / 1e3
        row["peak"] = row["gflops"] / settings.peaks[threads] if threads in settings.peaks else None
    row["rounds"] = len(timings.samples[OURS])
    row["error"] = errors.get(OURS)
    row["busy"] = timings.busy
    return row


def _fastest(ratios: dict[str, float], kinds: dict[str, str], wanted: tuple) -> float | None:
    """Return our speed-up over whichever call of these kinds is the fastest."""
    return min((r for n, r in ratios.items() if kinds.get(n) in wanted), default=None)


def geometric_mean(values: Iterable[float]) -> float:
    """Return exp(mean(log(values))); ValueError without values."""
    logs = [math.log(v) for v in values]
    if not logs:
        raise ValueError("geometric_mean: there are no values")
    return math.exp(statistics.fmean(logs))
