"""The whole model decides last: choices that do not help it go, and come back if they do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from liveweight.compress import compress_
from liveweight.compress.measure import Timings
from liveweight.nn import PackedConv2d, SparseLinear


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


class TieClock:
    """Packed convolutions take `alone` where dense takes 10; a model with them takes `inside`."""

    def __init__(self, alone: float, inside: float, joined: float = 20.0) -> None:
        self.alone, self.inside, self.joined = alone, inside, joined

    def __call__(self, calls, *, prepare=None, **options):
        if "compressed" in calls:
            found = {}
            for name in calls:
                prepare[name]()
                packed = isinstance(self.model[0], PackedConv2d) and self.model[0].packs
                found[name] = [self.inside if packed else 10.0 - (name == "compressed")] * 8
            return Timings(found)
        times = {"dense": 10.0}
        times |= {n: self.joined if "joined" in n else self.alone for n in calls if n != "dense"}
        return Timings({n: [times[n]] * 8 for n in calls})


def tied(clock, norm=False):
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)] if norm else [nn.Conv2d(3, 4, 3)]
    clock.model = nn.Sequential(*layers).eval()
    report = compress_(clock.model, torch.randn(2, 3, 6, 6), formats=["dense"], measure=clock)
    return report, clock.model[0]


def test_packed_layers_that_tie_alone_are_taken_where_the_whole_gains():
    report, layer = tied(TieClock(alone=10.5, inside=5.0))
    assert isinstance(layer, PackedConv2d) and report.changed == ["0"]
    assert report.speedup == pytest.approx(10 / 5, rel=0.2) and not report.notes
    assert "2.00x with all such layers" in report.layers[0].reason


@pytest.mark.parametrize(("alone", "inside"), [(10.5, 10.0), (12.0, 5.0)])
def test_packed_layers_that_lose_or_gain_nothing_are_not(alone, inside):
    report, layer = tied(TieClock(alone, inside))
    assert type(layer) is nn.Conv2d and not report.changed


@pytest.mark.parametrize(("inside", "packs"), [(4.0, True), (10.0, False)])
def test_a_tie_with_a_joined_layer_takes_its_place(inside, packs):
    report, layer = tied(TieClock(alone=5.2, inside=inside, joined=5.0), norm=True)
    assert layer.packs is packs and report.changed == ["0"]
    assert report.layers[0].chosen == ("dense, packed" if packs else "dense, joined")
