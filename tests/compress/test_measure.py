"""Timing is paired, ordered, bounded; checked with a clock that the calls themselves move."""

from __future__ import annotations

import gc

import pytest
import torch

from liveweight.compress.measure import Timings, measure_calls, quantile, torch_threads


class FakeClock:
    """Nanoseconds that pass only when a call says so."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[str] = []

    def __call__(self) -> int:
        return self.now

    def call(self, name, *costs_us):
        costs = list(costs_us)

        def work():
            self.calls.append(name)
            self.now += int(1000 * (costs.pop(0) if len(costs) > 1 else costs[0]))

        return work


def test_medians_and_paired_ratios():
    clock = FakeClock()
    calls = {"dense": clock.call("dense", 900.0), "sparse": clock.call("sparse", 300.0)}
    timings = measure_calls(calls, clock=clock, budget_s=0.05)
    assert timings.median_us("dense") == 900.0
    assert timings.median_us("sparse") == 300.0
    assert timings.speedup("sparse", "dense") == pytest.approx(3.0)
    assert len(timings.samples["dense"]) == len(timings.samples["sparse"]) >= 5


def test_slow_first_call_is_warm_up():
    clock = FakeClock()
    timings = measure_calls({"a": clock.call("a", 1e6, 400.0)}, clock=clock, budget_s=0.01)
    assert set(timings.samples["a"]) == {400.0}


def test_short_calls_repeat_inside_their_turn():
    clock = FakeClock()
    short, long = clock.call("short", 10.0), clock.call("long", 5000.0)
    timings = measure_calls({"s": short, "l": long}, clock=clock, budget_s=1e-9, min_rounds=4)
    assert timings.samples["s"] == [10.0] * 4
    assert clock.calls.count("long") < 12 < 4 * 30 <= clock.calls.count("short")


def test_order_rotates_and_reverses():
    clock = FakeClock()
    calls = {name: clock.call(name, 5000.0) for name in "abc"}
    measure_calls(calls, clock=clock, budget_s=1e-9, min_rounds=6)
    turns = "".join(clock.calls[-18:])
    assert [turns[i : i + 3] for i in range(0, 18, 3)] == ["abc", "cba", "bca", "acb", "cab", "bac"]


def test_budget_and_rounds_bound_the_work():
    clock = FakeClock()
    timings = measure_calls({"a": clock.call("a", 1000.0)}, clock=clock, budget_s=0.1)
    assert 80 <= len(timings.samples["a"]) <= 101
    timings = measure_calls({"a": clock.call("a", 1000.0)}, clock=clock, budget_s=9, max_rounds=7)
    assert len(timings.samples["a"]) == 7


def test_hopeless_calls_leave_the_rounds():
    clock = FakeClock()
    calls = {"dense": clock.call("dense", 400.0), "slow": clock.call("slow", 9000.0)}
    timings = measure_calls(calls, clock=clock, give_up_beyond=10, budget_s=0.01)
    assert timings.screened == {"slow"} and timings.samples["slow"] == [9000.0]
    assert timings.speedup("slow", "dense") == pytest.approx(400 / 9000)
    merged = timings.merged(timings)
    assert len(merged.samples["dense"]) == 2 * len(timings.samples["dense"])
    assert merged.samples["slow"] == [9000.0]


def test_preparation_runs_before_each_turn_and_is_not_timed():
    clock = FakeClock()
    calls = {"a": clock.call("a", 500.0), "b": clock.call("b", 500.0)}
    prepare = {"b": clock.call("set up b", 1e5)}
    timings = measure_calls(calls, prepare=prepare, clock=clock, budget_s=1e-9, min_rounds=3)
    assert timings.median_us("b") == 500.0
    before_b = [clock.calls[i - 1] for i, name in enumerate(clock.calls) if name == "b"]
    assert set(before_b) == {"set up b"}


def test_real_clock_inference_mode_and_collector():
    modes = []
    timings = measure_calls(
        {"a": lambda: modes.append(torch.is_inference_mode_enabled())}, budget_s=0.001
    )
    assert all(modes) and timings.median_us("a") > 0
    assert gc.isenabled()


def test_collector_comes_back_after_an_error():
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        measure_calls({"a": fail})
    assert gc.isenabled()


def test_bad_arguments():
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_calls({})
    with pytest.raises(ValueError, match="budget_s must be above 0, got 0"):
        measure_calls({"a": int}, budget_s=0)


def test_quantiles():
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert quantile([7.0], 0.25) == 7.0
    assert Timings({"a": [1.0, 2.0, 3.0, 4.0, 5.0]}).quartiles_us("a") == (2.0, 4.0)


def test_busy_machines_are_noticed():
    calm = Timings({"a": [10.0, 10.5, 11.0, 10.2]})
    assert not calm.busy
    assert Timings({"a": [10.0, 10.0, 90.0, 90.0]}).busy
    assert Timings(calm.samples, preemptions=400.0).busy
    assert calm.merged(Timings(calm.samples, preemptions=400.0)).busy


def test_calm_rounds_decide_what_load_only_adds_to():
    timings = Timings({"dense": [10.0] * 3 + [500.0] * 9, "a": [5.0] * 12})
    assert timings.speedup("a", "dense") == 100.0
    assert timings.calm_speedup("a", "dense") == 2.0


def test_threads_come_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
