"""benchmark names its rows, compares outputs, restores modes and refuses what it cannot time."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from liveweight.compress import benchmark
from liveweight.compress.measure import Timings

FAST = {"budget_s": 0.002}


def test_rows_are_named_and_compared(nets):
    model = nets.FunctionalNet()
    other = copy.deepcopy(model)
    other.fc3.bias.data += 0.5

    def plain(x):
        return model(x)

    result = benchmark(model, torch.randn(2, 12), [other, copy.deepcopy(model), plain], **FAST)
    names = [row.name for row in result.rows]
    assert names == ["model", "FunctionalNet", "FunctionalNet #2", "plain"]
    assert result.rows[0].ratio == 1.0
    assert result["FunctionalNet"].difference == pytest.approx(0.5, abs=1e-6)
    assert result["FunctionalNet #2"].difference == 0.0
    assert all(row.median_us > 0 and row.iqr_us >= 0 for row in result.rows)
    with pytest.raises(KeyError, match="no row 'x'"):
        result["x"]


def test_ratio_is_time_over_the_first_rows_time(nets):
    def measure(calls, **_):
        return Timings({"model": [10.0, 12.0, 10.0], "slow": [30.0, 30.0, 30.0]})

    model = nets.FunctionalNet()
    result = benchmark(model, torch.randn(2, 12), {"slow": model}, measure=measure)
    assert result["slow"].ratio == pytest.approx(3.0)
    assert result.rounds == 3
    text = result.table()
    assert "slow" in text and "3.00" in text and str(result) == text
    assert not result.busy and "other programs" not in text
    result.busy = True
    assert "other programs ran on this machine" in result.table()
    report = json.loads(result.to_json())
    assert report["rows"][1]["median_us"] == 30.0 and report["machine"]["torch"]


def test_compiled_models_are_called_so(nets):
    model = nets.FunctionalNet()
    compiled = torch.compile(model, backend="eager")
    result = benchmark(model, torch.randn(2, 12), [compiled], **FAST)
    assert result.rows[1].name == "torch.compile(FunctionalNet)"


def test_modes_and_threads_come_back(nets):
    model = nets.NormNet().train()
    model.bn2.eval()
    mean = model.bn1.running_mean.clone()
    before = torch.get_num_threads()
    result = benchmark(model, (torch.randn(2, 3, 8, 8),), threads=1, **FAST)
    assert result.machine["threads"] == 1 and torch.get_num_threads() == before
    assert model.training and model.bn1.training and not model.bn2.training
    assert torch.equal(model.bn1.running_mean, mean)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"against": 3}, TypeError, "list or a dict of callables, got int"),
        ({"against": ["net"]}, TypeError, "'str' in against is a str, not callable"),
        ({"against": {"model": len}}, ValueError, "first row's name"),
        ({"threads": 0}, ValueError, "at least 1, got 0"),
        ({"threads": 1.5}, TypeError, "must be an int, got float"),
        ({"budget_s": -1}, ValueError, "must be above 0"),
    ],
)
def test_bad_arguments(nets, arguments, error, words):
    with pytest.raises(error, match=words):
        benchmark(nets.FunctionalNet(), torch.randn(2, 12), **arguments)
