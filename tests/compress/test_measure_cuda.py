"""Turns on a GPU: what is captured when, what is timed how, and what stops it."""

from __future__ import annotations

import pytest
import torch

from liveweight.compress import measure
from liveweight.compress.measure import measure_calls
from liveweight.compress.measure_cuda import CudaGpu, GraphTimer, NotCapturable


class FakeGpu:
    """Captures by calling once; a replay takes the microseconds that the call returned."""

    def __init__(self, device=None) -> None:
        self.replayed: list[str] = []

    def capture(self, call):
        name, us = call()
        return lambda: (name, us)

    def time_us(self, replay):
        name, us = replay()
        self.replayed.append(name)
        return us


def test_calls_are_captured_once_after_their_preparation():
    done = []

    def call(name, us):
        def work():
            done.append(name)
            return name, us

        return work

    calls = {"dense": call("dense", 9.0), "sparse": call("sparse", 3.0)}
    prepare = {name: lambda name=name: done.append(f"prepare {name}") for name in calls}
    timer = GraphTimer(calls, prepare, FakeGpu())
    assert done == ["prepare dense", "dense", "prepare sparse", "sparse"]
    assert timer.warm_up("dense", 1.0) == 9.0 and timer.time_us("sparse") == 3.0
    assert done[4:] == [] and timer.gpu.replayed[-1] == "sparse"


def test_what_cannot_be_captured_is_named():
    def broken():
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(NotCapturable, match="^sparse: RuntimeError: operation not permitted.*$"):
        GraphTimer({"dense": lambda: ("dense", 1.0), "sparse": broken}, {}, FakeGpu())


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Let measure_calls take a FakeGpu for the device "cuda"."""
    monkeypatch.setattr(measure, "CudaGpu", FakeGpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)


def test_replays_are_measured_in_turns(pretend_gpu):
    calls = {"dense": lambda: ("dense", 8.0), "sparse": lambda: ("sparse", 2.0)}
    timings = measure_calls(calls, budget_s=1e-9, min_rounds=6, device="cuda")
    assert timings.speedups("sparse", "dense") == [4.0] * 6
    assert timings.note == ""
    assert not torch.backends.cudnn.benchmark  # looked for the fastest only while it measured


def test_all_calls_are_timed_plainly_where_one_cannot_be_captured(pretend_gpu):
    state = {"captures": 0}

    def moody():
        state["captures"] += 1
        if state["captures"] == 1:
            raise RuntimeError("a sync")

    calls = {"dense": lambda: ("dense", 8.0), "moody": moody}
    timings = measure_calls(calls, budget_s=1e-9, min_rounds=5, device="cuda")
    assert timings.note.startswith("timed without CUDA graphs, launches included: moody: Runtime")
    assert len(timings.samples["dense"]) == 5 and timings.median_us("dense") != 8.0
    assert timings.merged(timings).note == timings.note


def test_graphs_can_be_declined(pretend_gpu):
    calls = {"dense": lambda: ("dense", 8.0)}
    timings = measure_calls(calls, budget_s=1e-9, device="cuda", graphs=False)
    assert timings.note == "" and timings.median_us("dense") != 8.0


@pytest.mark.gpu
def test_replays_on_the_gpu_meet_a_cold_cache(gpu):
    x = torch.randn(1 << 20, device=gpu)  # 4 MiB: in the cache, if it were warm
    device = CudaGpu(gpu)
    replay = device.capture(lambda: x.mul_(1.0))
    warm = min(_time_warm(replay) for _ in range(20))
    assert min(device.time_us(replay) for _ in range(20)) > 0.9 * warm
    timings = measure_calls({"a": lambda: x + 1, "b": lambda: x * 2}, device=gpu, budget_s=0.05)
    assert timings.note == "" and timings.median_us("a") > 0


def _time_warm(replay) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    replay()
    start.record()
    replay()
    end.record()
    end.synchronize()
    return 1000.0 * start.elapsed_time(end)


@pytest.mark.gpu
def test_a_call_with_a_sync_is_timed_plainly(gpu):
    x = torch.randn(1000, device=gpu)
    timings = measure_calls({"sync": lambda: x.sum().item()}, device=gpu, budget_s=0.05)
    assert timings.note.startswith("timed without CUDA graphs")
    assert timings.median_us("sync") > 0
