"""The choosing rule on invented times: faster, slower, noisy, close, hopeless."""

from __future__ import annotations

import pytest

from liveweight.compress.decide import decide, decide_whole
from liveweight.compress.measure import Timings


def measured(*results, screened=()):
    """Return a measure function that gives these results in turn, and the budgets it was asked."""
    asked, left = [], list(results)

    def measure(budget):
        asked.append(budget)
        samples = left.pop(0) if len(left) > 1 else left[0]
        return Timings({n: list(s) for n, s in samples.items()}, frozenset(screened))

    return measure, asked


STEADY = [10.0] * 8


def test_faster_candidate_wins_at_once():
    measure, asked = measured({"dense": STEADY, "a": [5.0] * 8, "b": [2.5] * 8})
    verdict = decide(measure, 1.0, 0.1)
    assert (verdict.winner, verdict.speedup) == ("b", 4.0)
    assert verdict.reason == "b is 4.00x as fast as dense at 10.0% density"
    assert verdict.times_us == {"dense": 10.0, "a": 5.0, "b": 2.5} and asked == [1.0]


def test_slower_candidate_loses():
    measure, asked = measured({"dense": STEADY, "a": [12.5] * 8})
    verdict = decide(measure, 1.0, 0.45)
    assert (verdict.winner, verdict.speedup) == ("dense", 1.0)
    assert verdict.reason == "dense is faster: a runs at 0.80x of its speed at 45.0% density"
    assert asked == [1.0]


def test_equal_times_and_noise_stay_dense():
    noisy = {"dense": STEADY, "a": [8.0, 8.0, 8.0, 8.0, 8.0, 12.0, 12.0, 12.0]}
    measure, asked = measured(noisy)
    verdict = decide(measure, 1.0, 0.2)
    assert verdict.winner == "dense" and "beyond the noise" in verdict.reason
    assert asked == [1.0, 3.0]  # a close call is measured again, longer


def test_second_look_settles_a_close_call():
    first = {"dense": STEADY, "a": [8.0] * 5 + [12.0] * 3}
    second = {"dense": STEADY * 4, "a": [8.0] * 32}
    measure, _ = measured(first, second)
    assert decide(measure, 1.0, 0.2).winner == "a"


def test_min_speedup_is_a_threshold():
    measure, _ = measured({"dense": STEADY, "a": [8.0] * 8})
    assert decide(measure, 1.25, 0.2).winner == "a"
    verdict = decide(measure, 1.3, 0.2)
    assert verdict.winner == "dense" and "below min_speedup 1.3" in verdict.reason


def test_steady_candidate_beats_a_faster_but_wild_one():
    wild = [2.0] * 5 + [20.0] * 3
    measure, _ = measured({"dense": STEADY, "wild": wild, "steady": [8.0] * 8})
    assert decide(measure, 1.0, 0.2).winner == "steady"


def test_hopeless_candidate_is_reported_with_its_time():
    measure, _ = measured({"dense": STEADY, "a": [200.0]}, screened={"a"})
    verdict = decide(measure, 1.0, 0.9)
    assert verdict.times_us["a"] == 200.0 and "0.05x" in verdict.reason


def test_other_work_on_the_machine_does_not_flatter():
    """Dense uses several threads and waits for busy cores in most rounds; calm, it is faster."""
    busy = {"dense": [9.0] * 3 + [4000.0] * 17, "a": [10.0] * 20}
    measure, _ = measured(busy)
    assert decide(measure, 1.0, 0.2).winner == "dense"
    busy["a"] = [3.0] * 20
    verdict = decide(measured(busy)[0], 1.0, 0.2)
    assert (verdict.winner, verdict.speedup) == ("a", 3.0)
    assert decide_whole(measured({"dense": busy["dense"], "compressed": [10.0] * 20})[0])[1] == 0.9


@pytest.mark.parametrize("time", [9.0, 10.0, 11.0])
def test_whole_model(time):
    measure, _ = measured({"dense": STEADY, "compressed": [time] * 8})
    timings, ratio = decide_whole(measure)
    assert ratio == pytest.approx(10 / time) and timings.median_us("compressed") == time


@pytest.mark.parametrize(("second", "faster"), [([9.0] * 24, True), ([12.0] * 24, False)])
def test_whole_model_close_call(second, faster):
    first = {"dense": STEADY, "compressed": [9.0] * 5 + [12.0] * 3}
    measure, asked = measured(first, {"dense": [10.0] * 24, "compressed": second})
    assert (decide_whole(measure)[1] >= 1.0) is faster and asked == [2.0, 6.0]
