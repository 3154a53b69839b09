"""Paired timing: candidates take turns, so that a noisy machine disturbs all of them alike.

On a GPU the turns are replays of CUDA graphs on a cold cache, or, where a call cannot be captured
or it is asked for, calls as Python makes them.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from liveweight.compress.measure_cuda import CudaGpu, GraphTimer, NotCapturable

try:
    import resource
except ImportError:  # not on Windows
    resource = None

Call = Callable[[], object]

# A slot is long against the clock's own cost (about 0.1 us) and short against a scheduler's tick.
SLOT_US = 300.0
MAX_REPEATS = 1000
# Signs that something else ran on the machine: an interquartile range above this share of the
# median, or more than so many preemptions of this process per second. A call on several threads
# then waits for a scheduler's slice (some ms) at every barrier, in the fastest rounds too.
BUSY_SPREAD = 0.5
BUSY_PREEMPTIONS = 100.0
BUSY_NOTE = "other programs ran on this machine: measure again when it is quiet"


@dataclass(frozen=True)
class Timings:
    """Microseconds per call: one list per name, entry i of every list from the same round i.

    A name in `screened` was so slow in the warm-up that it was left out of the rounds: its list
    holds the warm-up's figure alone. `preemptions` are per second (0 where the system has no
    figure). `note` says what a reader must know of how the times were taken, "" for nothing.
    """

    samples: Mapping[str, list[float]]
    screened: frozenset[str] = frozenset()
    preemptions: float = 0.0
    note: str = ""

    def median_us(self, name: str) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.samples[name])

    def quartiles_us(self, name: str) -> tuple[float, float]:
        """Return the first and the third quartile over the rounds."""
        return quantile(self.samples[name], 0.25), quantile(self.samples[name], 0.75)

    def speedups(self, name: str, base: str) -> list[float]:
        """Return base time / own time, round by round."""
        if name in self.screened or base in self.screened:
            return [self.median_us(base) / self.median_us(name)]
        pairs = zip(self.samples[base], self.samples[name], strict=True)
        return [b / max(a, 1e-9) for b, a in pairs]

    def speedup(self, name: str, base: str) -> float:
        """Return the median of the per-round speed-ups."""
        return statistics.median(self.speedups(name, base))

    def calm_speedup(self, name: str, base: str) -> float:
        """Return the 10th percentile of the base's times over the own one.

        Other work on the machine only ever adds time, and adds most to calls that use several
        threads; the fastest rounds are those it disturbed least.
        """
        return quantile(self.samples[base], 0.1) / max(quantile(self.samples[name], 0.1), 1e-9)

    def spread(self, name: str) -> float:
        """Return the interquartile range as a fraction of the median."""
        low, high = self.quartiles_us(name)
        return (high - low) / max(self.median_us(name), 1e-9)

    @property
    def busy(self) -> bool:
        """True where other programs disturbed the measurement."""
        spread = max(self.spread(name) for name in self.samples)
        return spread > BUSY_SPREAD or self.preemptions > BUSY_PREEMPTIONS

    def merged(self, more: Timings) -> Timings:
        """Return the rounds of two measurements of the same names together."""
        screened = self.screened | more.screened
        joined = {name: [*own, *more.samples[name]] for name, own in self.samples.items()}
        joined.update({name: [statistics.median(joined[name])] for name in screened})
        worst = max(self.preemptions, more.preemptions)
        return Timings(joined, screened, worst, self.note or more.note)


def quantile(values: list[float], share: float) -> float:
    """Return the quantile of the values, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def measure_calls(
    calls: Mapping[str, Call],
    *,
    prepare: Mapping[str, Call] | None = None,
    budget_s: float = 0.2,
    min_rounds: int = 5,
    max_rounds: int = 400,
    give_up_beyond: float | None = None,
    device: torch.device | str = "cpu",
    graphs: bool = True,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Timings:
    """Time the calls in turns, under torch.inference_mode, and return the microseconds per call.

    Every round times every call once, in an order that rotates and is reversed from round to
    round; calls shorter than 0.3 ms are repeated inside their turn. `prepare[name]` runs before
    each turn of that name, outside the clock. `budget_s` is seconds per call; at least
    `min_rounds` rounds are run. A call that takes more than `give_up_beyond` times as long as the
    first one in the warm-up takes no part in the rounds. `clock` returns nanoseconds.

    On a CUDA device every call is captured in a CUDA graph, after `prepare`, and a turn replays it
    on a cold L2 cache. Without `graphs`, or where one of the calls cannot be captured, a turn is
    the call as Python makes it, launches included and caches warm.
    """
    if not calls:
        raise ValueError("measure_calls: there is nothing to measure")
    if not budget_s > 0:
        raise ValueError(f"measure_calls: budget_s must be above 0, got {budget_s}")
    with torch.inference_mode(), _no_collector(), _fastest_cudnn(torch.device(device)):
        timer, note = _make_timer(calls, prepare or {}, torch.device(device), graphs, clock)
        first_us = {name: timer.warm_up(name, budget_s) for name in calls}
        base_us = next(iter(first_us.values()))
        screened = frozenset(
            n for n, us in first_us.items() if give_up_beyond and us > give_up_beyond * base_us
        )
        names = [n for n in calls if n not in screened]
        samples: dict[str, list[float]] = {n: [] for n in names}
        deadline = clock() + budget_s * 1e9 * len(names)
        start, start_s, rounds = _preemptions(), time.perf_counter(), 0
        while rounds < min_rounds or (rounds < max_rounds and clock() < deadline):
            for name in _order(names, rounds):
                samples[name].append(timer.time_us(name))
            rounds += 1
        preemptions = (_preemptions() - start) / max(time.perf_counter() - start_s, 1e-3)
    samples.update({n: [first_us[n]] for n in screened})
    return Timings({n: samples[n] for n in calls}, screened, preemptions, note)


def _make_timer(
    calls: Mapping[str, Call],
    prepare: Mapping[str, Call],
    device: torch.device,
    graphs: bool,
    clock: Callable[[], int],
) -> tuple[_Timer | GraphTimer, str]:
    """Return what times the turns, and a note where that is not what a GPU could do."""
    note = ""
    if device.type == "cuda" and graphs:
        try:
            return GraphTimer(calls, prepare, CudaGpu(device)), note
        except NotCapturable as error:
            torch.cuda.synchronize(device)
            note = f"timed without CUDA graphs, launches included: {error}"
    return _Timer(calls, prepare, device, clock), note


def _preemptions() -> int:
    """Return how often the scheduler has taken a core away from this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def _order(names: list[str], index: int) -> list[str]:
    start = (index // 2) % len(names)
    turned = names[start:] + names[:start]
    return turned if index % 2 == 0 else turned[::-1]


class _Timer:
    """Times one turn of one call; knows how often each call repeats inside its turn."""

    def __init__(self, calls, prepare, device: torch.device, clock: Callable[[], int]) -> None:
        self.calls = calls
        self.prepare = prepare
        self.clock = clock
        self.repeats: dict[str, int] = {}
        self.sync = torch.cuda.synchronize if device.type == "cuda" else None

    def warm_up(self, name: str, budget_s: float) -> float:
        """Run the call until it is warm, set its repeats, and return its best time in us."""
        self.repeats[name] = 1
        self.time_us(name)  # the first call may compile, pack or allocate
        best, start = self.time_us(name), self.clock()
        for _ in range(4):
            if self.clock() - start > 0.1e9 * budget_s:
                break
            best = min(best, self.time_us(name))
        self.repeats[name] = max(1, min(MAX_REPEATS, math.ceil(SLOT_US / max(best, 1e-3))))
        return best

    def time_us(self, name: str) -> float:
        """Run one turn and return microseconds per call."""
        if name in self.prepare:
            self.prepare[name]()
        call, repeats = self.calls[name], self.repeats[name]
        if self.sync:
            self.sync()
        start = self.clock()
        for _ in range(repeats):
            call()
        if self.sync:
            self.sync()
        return (self.clock() - start) / 1e3 / repeats


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _fastest_cudnn(device: torch.device) -> Iterator[None]:
    """Let cuDNN look for its fastest convolution while dense layers are timed on a GPU."""
    before = torch.backends.cudnn.benchmark
    try:
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run with this many torch threads (None: as they are) and set the old number again."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)
