"""Counts, predictions from given speeds, what they leave out; the calibration itself runs once."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from liveweight.compress import compress_
from liveweight.compress.calibrate import bandwidth, calibrate
from liveweight.compress.cost_model import CostModel, Speed
from liveweight.compress.work import stored_weights, work_of


def test_counts_of_a_linear():
    layer = nn.Linear(32, 16)
    layer.weight.data[:, 8:] = 0.0
    work = work_of(layer, "unstructured", torch.randn(2, 3, 32))
    assert (work.kind, work.rows, work.plane) == ("linear", 6, 1)
    assert work.stored == 128 and work.flops == 2 * 128 * 6 and work.out_bytes == 6 * 16 * 4
    assert work_of(layer, "dense", torch.randn(1, 32)).stored == 512
    assert stored_weights(layer.weight, "block") == 256  # one of two 16x16 blocks
    assert work.features == (math.log2(6), 0.0, -2.0)


@pytest.mark.parametrize(
    ("options", "plane"),
    [({"padding": 1}, 63), ({"stride": 2}, 12), ({"padding": "same"}, 63), ({"dilation": 2}, 15)],
)
def test_counts_of_a_convolution(options, plane):
    layer = nn.Conv2d(4, 6, 3, **options)
    layer.weight.data[:, 1:] = 0.0
    layer.weight.data[:, 0, 1:] = 0.0
    work = work_of(layer, "kernelwise", torch.randn(5, 4, 9, 7))
    with torch.no_grad():
        assert layer(torch.randn(5, 4, 9, 7))[0, 0].numel() == plane == work.plane
    assert work.rows == 5 and work.stored == 6 * 9 and work.kind == "conv"
    assert stored_weights(layer.weight, "unstructured") == 6 * 3
    assert work_of(nn.Conv2d(2, 2, 1), "dense", torch.randn(1, 2, 4, 4)).kind == "pointwise"


def model_of(speeds: dict[str, float], overhead: float = 1.0) -> CostModel:
    """A model in which a format runs at a fixed speed, at unbounded bandwidth."""
    return CostModel(
        lambda name, kind: Speed(overhead, [((0.0, 0.0, 0.0), speeds[name])]), lambda: 1e12
    )


def test_prediction_is_overhead_and_work_over_speed():
    layer, x = nn.Linear(100, 50), torch.randn(10, 100)
    us = model_of({"dense": 10.0}).predict(layer, "dense", x)
    assert us == pytest.approx(1.0 + 2 * 5000 * 10 / 10e3)
    slow = CostModel(lambda name, kind: Speed(1.0, [((0.0, 0.0, 0.0), 10.0)]), lambda: 4.0)
    assert slow.predict(layer, "dense", x) == pytest.approx(1.0 + 5000 * 4 / 8.0)
    behind = slow.predict(layer, "dense", x, passes=2) - slow.predict(layer, "dense", x)
    assert behind == pytest.approx(2 * 2 * 10 * 50 * 4 / 4.0)


def test_speed_is_that_of_the_nearest_points():
    speed = Speed(0.0, [((0.0, 0.0, 0.0), 10.0), ((8.0, 0.0, 0.0), 100.0)])
    assert speed.at((0.0, 0.0, 0.0)) == pytest.approx(10.0, rel=0.05)
    assert 25 < speed.at((4.0, 0.0, 0.0)) < 40
    assert speed.at((8.5, 0.0, 0.0)) == pytest.approx(100.0, rel=0.05)


def test_what_was_measured_is_learned():
    layer, x = nn.Linear(64, 64), torch.randn(4, 64)
    model = model_of({"dense": 10.0}, overhead=0.0)
    model.learn(layer, "dense", x, 2 * 64 * 64 * 4 / 1e3 / 80.0)
    assert model.predict(layer, "dense", x) == pytest.approx(2 * 64 * 64 * 4 / 80e3, rel=0.05)


def test_hopeless_candidates_are_not_measured(nets):
    model = nets.sparsify(nets.settle(nets.LeNet()), 0.2)
    dense, x = copy.deepcopy(model), torch.randn(2, 1, 16, 16)
    speeds = dict.fromkeys(["dense", "dense, packed", "kernelwise", "unstructured"], 1.0)
    speeds |= {"block": 1e-3, "nm": 1e-3, "kernelwise": 100.0}
    clock = nets.Clock(**nets.ALL_FASTER)
    report = compress_(model, x, measure=clock, cost_model=model_of(speeds, overhead=0.0))
    assert clock.races[0] == ["dense", "kernelwise+relu", "kernelwise+relu+pool"]
    assert clock.races[2] == ["dense", "unstructured+relu"]  # fewer weights, the same speed
    row = report.layers[0]
    assert row.predicted_us["dense"] > row.predicted_us["kernelwise+relu"] > 0
    assert "predicted" in report.table()
    assert torch.allclose(model(x), dense(x), atol=1e-5)


def test_nothing_is_measured_where_dense_is_predicted_to_win_by_far(nets):
    model = nets.sparsify(nets.settle(nets.LeNet()), 0.2)
    speeds = dict.fromkeys(["dense, packed", "kernelwise", "unstructured", "block", "nm"], 1e-3)
    clock = nets.Clock(**nets.ALL_FASTER)
    fast = model_of({"dense": 100.0, **speeds})
    report = compress_(model, torch.randn(2, 1, 16, 16), measure=clock, cost_model=fast)
    assert clock.races == [] and report.changed == []
    assert report.layers[0].reason == "dense is predicted to be the fastest by far"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dense", "linear"), ("unstructured", "linear"), ("kernelwise", "pointwise")],
)
def test_calibration_gives_plausible_speeds(name, kind):
    state = torch.random.get_rng_state()
    speed = calibrate(name, kind)
    assert 0 < speed.overhead_us < 1e5
    assert len(speed.points) >= 4 and all(0 < gflops < 1e5 for _, gflops in speed.points)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bandwidth_is_plausible():
    assert 10 < bandwidth() < 1e7
