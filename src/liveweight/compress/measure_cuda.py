"""Turns on a GPU: CUDA graphs replayed on a cold L2 cache, timed by events on the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

Call = Callable[[], object]

# The cache is cleared by writing so many times its size: a line may survive one pass.
L2_MULTIPLE = 3
# A figure of the warm-up is the best of so many turns.
WARM_UP_TURNS = 5


class NotCapturable(RuntimeError):
    """A call cannot be captured in a CUDA graph; the message names it and says why."""


class Gpu(Protocol):
    """What a turn needs of a GPU, so that the logic can be checked without one."""

    def capture(self, call: Call) -> Call:
        """Return a call that replays the given one."""

    def time_us(self, replay: Call) -> float:
        """Return the microseconds of a replay that finds none of its inputs in the cache."""


class CudaGpu:
    """A device of torch.cuda."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._cold = torch.empty(L2_MULTIPLE * l2_bytes, dtype=torch.uint8, device=device)

    def capture(self, call: Call) -> Call:
        """Capture a call that has been warmed up on a stream of its own, as capturing asks."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            return graph.replay

    def time_us(self, replay: Call) -> float:
        """Clear the cache, replay, and wait; the clearing hides the launch from the clock."""
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._cold.zero_()
            start.record()
            replay()
            end.record()
            end.synchronize()
            return 1000.0 * start.elapsed_time(end)


class GraphTimer:
    """Times one turn of one call, all calls captured before the first turn.

    A call is captured in the state that its `prepare` leaves behind, so a turn needs no preparing.
    Raises NotCapturable where any call cannot be captured: times with and without the launch are
    not to be compared.
    """

    def __init__(self, calls: Mapping[str, Call], prepare: Mapping[str, Call], gpu: Gpu) -> None:
        self.gpu = gpu
        self.replays = {}
        for name, call in calls.items():
            if name in prepare:
                prepare[name]()
            try:
                self.replays[name] = gpu.capture(call)
            except Exception as error:  # a sync, a shape that depends on data, a foreign stream
                text = (str(error).strip() or "unknown").splitlines()[0]
                raise NotCapturable(f"{name}: {type(error).__name__}: {text}") from error

    def warm_up(self, name: str, budget_s: float) -> float:
        """Return the best of some turns, in microseconds."""
        return min(self.time_us(name) for _ in range(WARM_UP_TURNS))

    def time_us(self, name: str) -> float:
        """Run one turn and return its microseconds."""
        return self.gpu.time_us(self.replays[name])
