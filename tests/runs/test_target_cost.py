"""The costs that prune_to_ brings down, the goal in words, and where a search starts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import liveweight as lw
from liveweight.runs.target import cost as target_cost
from liveweight.runs.target.goal import parse_goal
from liveweight.runs.target.guess import expected_sparsity


def make() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 9, 30), nn.ReLU(),
        nn.Linear(30, 5),
    )  # fmt: skip


X = torch.randn(1, 1, 12, 12)
WEIGHTS = 8 * 9 + 12 * 8 * 9 + 108 * 30 + 150


def shrunk(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    lw.shrink_(twin, X)
    return twin


def kept_weights(model: nn.Module) -> int:
    return sum(int(m.weight.ne(0).sum()) for m in model if isinstance(m, (nn.Linear, nn.Conv2d)))


def test_dense_flops_count_attention_and_zeros_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(3, 6, 1, groups=3))

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 8)

        def forward(self, x):
            return self.project(x @ x.transpose(1, 2) @ x)

    x = torch.randn(2, 3, 4)
    inputs = target_cost.ExampleInputs(args=(x,))
    products = 2 * 2 * (3 * 4 * 3) * 2  # two products of [3, 4] and [4, 3] for two samples
    assert target_cost.Flops(Attention(), inputs, "kept").dense == products + 2 * 6 * 32
    cost = target_cost.Flops(model, inputs, "kept")
    assert cost.dense == 2 * (6 * 16 + 2 * 4 * 6)
    with torch.no_grad():
        model[0].weight[:, 0] = 0
        model[1].weight[0] = 0
    assert cost.of(copy.deepcopy(model)) == 2 * (6 * 12 + 2 * 4 * 5)
    assert target_cost.Flops(model, inputs, "dense").of(model) == cost.dense


class Clock:
    """Stands for compress.benchmark: what each candidate takes is known."""

    def __init__(self, monkeypatch, dense=None):
        self.dense = dense or {"model": 100.0, "dense, channels_last": 80.0}
        self.drift, self.busy, self.against = 1.0, False, []
        monkeypatch.setattr(lw.compress, "benchmark", self)
        monkeypatch.setattr(lw.compress, "compress_", lambda model, inputs: None)

    def __call__(self, model, inputs, against):
        self.against.append(list(against.values()))
        times = dict(self.dense)
        if list(against) == ["dense"]:
            fastest = min(self.dense.values())
            times = {"model": fastest * kept_weights(model) / WEIGHTS, "dense": fastest}
        base, drift = times["model"], self.drift
        rows = [
            lw.compress.BenchmarkRow(n, drift * t, 0, 0, t / base, 0, 0, None)
            for n, t in times.items()
        ]
        return lw.compress.BenchmarkResult(rows, busy=self.busy)


def test_latency_is_paired_with_the_fastest_dense(monkeypatch):
    clock = Clock(monkeypatch)
    cost = target_cost.Latency(make(), target_cost.ExampleInputs((X,)), True, compile_dense=False)
    assert cost.dense == pytest.approx(80e-6)
    assert cost.fastest == "dense, channels_last"
    pruned = make()
    lw.prune_(pruned, importance="magnitude", sparsity=0.5)
    clock.drift, clock.busy = 3.0, True  # the machine slows down: a share does not see it
    expected = 80e-6 * kept_weights(shrunk(pruned)) / WEIGHTS
    assert cost.of(copy.deepcopy(pruned)) == pytest.approx(expected)
    assert clock.against[-1] == [cost.reference]
    assert cost.reference[4].weight.is_contiguous(memory_format=torch.channels_last)
    cost.relative = False
    assert cost.of(copy.deepcopy(pruned)) == pytest.approx(3 * expected)
    assert cost.notes == [
        "the fastest dense form: dense, channels_last",
        "other programs ran while latency was measured",
    ]


def test_a_share_of_the_latency_is_found_with_the_package_itself(monkeypatch):
    clock = Clock(monkeypatch)
    model = make()
    report = lw.prune_to_(
        model, None, X, target_latency="30%", importance="magnitude", compile_dense=False
    )
    assert report.reached and report.target == pytest.approx(24e-6)
    assert kept_weights(shrunk(model)) <= 0.3 * WEIGHTS
    assert len(clock.against) == 1 + sum(math.isfinite(t.cost) for t in report.trials)
    assert "the fastest dense form: dense, channels_last" in str(report)


def test_a_compiler_that_fails_is_a_note(monkeypatch):
    Clock(monkeypatch, {"model": 100.0})

    def fail(model, inputs):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(target_cost, "compiled", fail)
    model = nn.Sequential(nn.Linear(4, 2))
    inputs = target_cost.ExampleInputs((torch.ones(1, 4),))
    cost = target_cost.Latency(model, inputs, True)
    assert cost.notes == [
        "torch.compile of the dense model failed: no compiler",
        "the fastest dense form: dense",
    ]


@pytest.mark.parametrize("found", [math.nan, -1.0, 0.0, None, "fast"])
def test_a_measure_that_gives_no_seconds_is_named(found):
    model = make()
    with pytest.raises(ValueError, match="measure must return seconds above 0, got"):
        lw.prune_to_(model, [X], X, target_latency="50%", measure=lambda m: found)
    assert not lw.masks(model)


def test_goals_in_words_and_parts():
    goal = parse_goal(target_latency=None, target_flops="12.5 %", target_parameters=None)
    assert str(goal) == "12.5% of the dense FLOPs"
    assert goal.cost(800.0) == pytest.approx(100.0)
    assert [goal.cost(800.0, part) for part in (1 / 3, 2 / 3)] == pytest.approx([400.0, 200.0])
    assert str(parse_goal(target_latency=0.002)) == "0.002 seconds"
    assert parse_goal(target_parameters=1000).cost(500.0, 0.5) == 1000.0


class Counting:
    """A cost model: microseconds are kept weights, dense ones at half the price."""

    def predict(self, layer, name, x):
        dense = name == "dense"
        return layer.weight.numel() / 2 if dense else float(layer.weight.ne(0).sum())


def test_the_search_starts_where_the_cost_model_expects_the_target():
    inputs = target_cost.ExampleInputs((X,))
    by = {"conv": "kernel", "linear": "weight"}
    options = {"highest": 0.99, "cost_model": Counting()}
    found = expected_sparsity(make(), inputs, 0.4, by, **options)
    assert found == pytest.approx(0.8, abs=0.03)  # 0.2 of the weights take 0.4 of dense's time
    assert expected_sparsity(make(), inputs, 0.001, by, **options) == 0.99
    by = {"conv": "neuron", "linear": "neuron"}
    assert expected_sparsity(make(), inputs, 0.25, by, **options) == 0.5
    assert expected_sparsity(make(), inputs, 0.4, {"conv": "block"}, **options) is None
    assert expected_sparsity(nn.ReLU(), inputs, 0.4, {"conv": "weight"}, **options) is None
