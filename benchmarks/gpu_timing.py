"""Time calls on a GPU: captured in CUDA graphs, cold L2 cache, in turns, medians.

One graph holds one call per input set; together the sets are several times the L2 cache, so a call
finds none of its inputs there. The calls that are compared are replayed in turns, so that a change
of clock or temperature meets all of them.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import torch

L2_MULTIPLE = 4
MOST_SETS = 256
ROUNDS = 40


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    median_us: float
    low_us: float  # first quartile
    high_us: float  # third quartile


def summarize(samples_us: list[float]) -> Timing:
    low, median, high = statistics.quantiles(samples_us, n=4, method="inclusive")
    return Timing(median, low, high)


def sets_needed(set_bytes: int, l2_bytes: int) -> int:
    """Return how many input sets of this size are several times the L2 cache."""
    return max(2, min(MOST_SETS, -(-L2_MULTIPLE * l2_bytes // max(set_bytes, 1))))


def _capture(call: Callable[[int], object], sets: int) -> torch.cuda.CUDAGraph:
    for i in range(sets):  # compiles and fills the allocator outside the capture
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            call(i)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _elapsed_us(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end)


def time_in_turns(
    calls: dict[str, Callable[[int], object]], sets: int, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Return the time of each call(set number), without launch overhead."""
    graphs = {name: _capture(call, sets) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        order = list(graphs) if turn % 2 == 0 else list(reversed(graphs))
        for name in order:
            samples[name].append(_elapsed_us(graphs[name].replay) / sets)
    return {name: summarize(values) for name, values in samples.items()}


def time_eager(call: Callable[[int], object], sets: int, rounds: int = ROUNDS) -> Timing:
    """Return the time of a call as Python makes it, launch overhead included."""

    def all_sets() -> None:
        for i in range(sets):
            call(i)

    all_sets()
    return summarize([_elapsed_us(all_sets) / sets for _ in range(rounds)])
