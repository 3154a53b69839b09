"""The whole model decides last: choices that do not help it go, and come back if they do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from liveweight.compress import compress_
from liveweight.compress.measure import Timings
from liveweight.nn import SparseLinear


class WholeClock:
    """Every layer alone is faster sparse; the whole costs what a function of the layers says."""

    def __init__(self, model: nn.Module, cost) -> None:
        self.model, self.cost = model, cost
        self.trials = 0

    def __call__(self, calls, *, prepare=None, **options):
        if "compressed" not in calls:
            # The later layer gains more, so that the order of giving up is known.
            width = next(iter(calls.values()))().shape[-1]
            return Timings({n: [10.0 if n == "dense" else 9.0 - width / 8] * 8 for n in calls})
        self.trials += 1
        times = {}
        for name in calls:
            prepare[name]()
            sparse = {i for i, m in enumerate(self.model) if isinstance(m, SparseLinear)}
            times[name] = [self.cost(sparse)] * 8
        return Timings(times)


@pytest.fixture
def model(nets):
    widths = [4, 6, 8, 10, 12]
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    return nets.sparsify(nn.Sequential(*layers), 0.4)


def kept(model, cost):
    clock = WholeClock(model, cost)
    report = compress_(model, torch.randn(2, 4), formats=["unstructured"], measure=clock)
    sparse = {i for i, m in enumerate(model) if isinstance(m, SparseLinear)}
    assert report.changed == [str(i) for i in sorted(sparse)]
    return sparse, report, clock


def test_all_are_kept_where_they_help(model):
    sparse, report, clock = kept(model, lambda s: 10.0 - len(s))
    assert sparse == {0, 1, 2, 3} and report.speedup == pytest.approx(10 / 6)
    assert clock.trials == 1


def test_one_bad_choice_costs_only_itself_and_its_half(model):
    sparse, report, _ = kept(model, lambda s: 10.0 - len(s) + 20.0 * (0 in s))
    assert sparse == {1, 2, 3} and report.speedup == pytest.approx(10 / 7)
    assert "undone: the whole model ran at" in report.layers[0].reason


def test_none_is_kept_where_none_helps(model):
    sparse, report, _ = kept(model, lambda s: 10.0 + len(s))
    assert sparse == set() and report.speedup is None
    assert "no layer was changed" in report.table()


def test_a_bad_strong_choice_gives_way_to_the_weaker_ones(model):
    sparse, report, _ = kept(model, lambda s: 10.0 - len(s) + 20.0 * (3 in s) + 20.0 * (2 in s))
    assert sparse == {0, 1} and report.speedup == pytest.approx(10 / 8)


def test_trials_are_bounded(nets):
    layers = [nn.Linear(4 + i, 5 + i) for i in range(30)]
    model = nets.sparsify(nn.Sequential(*layers), 0.4)
    sparse, _, clock = kept(model, lambda s: 10.0 + len(s))
    assert sparse == set() and clock.trials <= 12
