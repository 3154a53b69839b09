"""Hyper and hypo units: found by their rates, removed whole, adapted first."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight.prune import adapt_, find_hyper_hypo, masks, prune_, remove_units_

DATA = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def unequal(nets):
    """A net with a unit that never fires and one that always does, in conv2 and in fc1."""
    net = nets.ConvNet().eval()
    with torch.no_grad():
        for layer in (net.conv2, net.fc1):
            layer.bias[0], layer.bias[1] = -100.0, 100.0
    return net


def test_units_are_found_by_how_often_they_fire(nets):
    net = unequal(nets)
    found = find_hyper_hypo(net, DATA)
    assert list(found) == ["conv1", "conv2", "fc1"]  # not the output
    for name in ("conv2", "fc1"):
        assert bool(found[name].hypo[0]) and bool(found[name].hyper[1])
        assert found[name].rate[0] == 0 and found[name].rate[1] == 1
        assert torch.equal(found[name].hypo, found[name].rate <= 0.05)
    both = found.units()
    assert torch.equal(both["fc1"], found["fc1"].hypo | found["fc1"].hyper)
    assert torch.equal(found.units("hyper")["fc1"], found["fc1"].hyper)
    assert "hypo" in str(found) and "conv2" in found.table()


def test_limits_may_be_percentiles_of_each_layer(nets):
    net = nets.ConvNet().eval()
    found = find_hyper_hypo(net, DATA, low=0.3, high=0.7, percentile=True, layers="conv1")
    rate = found["conv1"].rate
    assert torch.equal(found["conv1"].hypo, rate <= rate.quantile(0.3))
    assert torch.equal(found["conv1"].hyper, rate >= rate.quantile(0.7))


def test_removed_units_answer_nothing(nets):
    net = unequal(nets)
    assert (
        remove_units_(net, find_hyper_hypo(net, DATA, layers=["conv2", "fc1"]).units("hyper")) >= 2
    )
    assert net.fc1.weight[1].eq(0).all() and net.fc1.bias[1] == 0
    assert not masks(net)["fc1.weight"][1].any()
    seen = []
    net.fc1.register_forward_hook(lambda m, a, out: seen.append(out))
    net(DATA[0])
    assert seen[0][:, 1].eq(0).all()


def test_wrong_words_and_masks_are_refused_and_change_nothing(nets):
    net = nets.ConvNet().eval()
    before = copy.deepcopy(net.state_dict())
    for options in ({"low": 0.9, "high": 0.1}, {"low": -1}, {"high": 2}):
        with pytest.raises(ValueError, match="low <= high"):
            find_hyper_hypo(net, DATA, **options)
    with pytest.raises(ValueError, match="'hypo', 'hyper' or 'both'"):
        find_hyper_hypo(net, DATA).units("all")
    ones = torch.ones(4, dtype=torch.bool)
    for units, words, error in (
        ({"fc2": ones}, "model's output", ValueError),
        ({"fc1": ones}, "'fc1' has 7 units", ValueError),
        ({"fc1": torch.ones(7)}, "bool", TypeError),
        ({"fc9": ones}, "fc9", ValueError),
    ):
        with pytest.raises(error, match=words):
            remove_units_(net, units)
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], v) for k, v in after.items())


def moved(before, net):
    return {n: p.detach() != before[n] for n, p in net.named_parameters()}


def test_stage_one_moves_only_what_belongs_to_the_units(nets):
    net = nets.ConvNet().eval()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    units = {"conv2": torch.tensor([0, 1, 0, 0, 0]).bool(), "conv1": torch.zeros(6).bool()}

    def make(parameters):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)

    report = adapt_(net, DATA, units, epochs=(3, 0), margin=0.0, make_optimizer=make)
    found = moved(before, net)
    assert found["conv2.weight"][1].any() and not found["conv2.weight"][[0, 2, 3, 4]].any()
    assert found["conv2.bias"].tolist() == [False, True, False, False, False]
    columns = found["fc1.weight"].any(0)
    assert columns[4:8].any() and not columns[:4].any() and not columns[8:].any()
    still = ("conv1.weight", "conv1.bias", "bn1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    assert not any(found[name].any() for name in still)
    assert [row["stage"] for row in report.rows] == [1, 1, 1]
    assert report.rows[0]["sure"] == report.rows[0]["samples"] == 24


def test_stage_two_and_blind_adaptation_move_everything_under_the_masks(nets):
    for units in (None, {"fc1": torch.ones(7, dtype=torch.bool)}):
        net = nets.ConvNet().eval()
        prune_(net, importance="magnitude", sparsity=0.5)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        report = adapt_(net, DATA, units, epochs=(1, 2), margin=0.0, lr=0.01)
        found = moved(before, net)
        assert all(f.any() for n, f in found.items() if n.startswith(("conv", "fc")))
        for name, mask in masks(net).items():
            assert net.get_parameter(name)[~mask].eq(0).all()
        assert [r["stage"] for r in report.rows] == ([1, 1, 1] if units is None else [1, 2, 2])
        assert not net.training


def test_adaptation_helps_where_the_inputs_have_moved():
    torch.manual_seed(0)
    centres = 3 * torch.randn(4, 10)
    y = torch.randint(0, 4, (400,))
    x = centres[y] + 0.7 * torch.randn(400, 10)
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    shifted = x + 6.0 * torch.randn(10)
    accuracy = lambda: float((net(shifted).argmax(1) == y).float().mean())  # noqa: E731
    start = accuracy()
    units = find_hyper_hypo(net, [shifted]).units()
    adapt_(net, shifted.split(50), units, epochs=(4, 8), margin=0.6, lr=0.003)
    assert 0.4 < start < 0.95 and accuracy() > start + 0.05


def test_unusable_arguments_are_refused_and_a_failure_restores(nets):
    net = nets.ConvNet().eval()
    before = copy.deepcopy(net.state_dict())
    for options, words in (
        ({"margin": 1.0}, "margin"),
        ({"epochs": (1, 2, 3)}, "epochs"),
        ({"epochs": -1}, "epochs"),
        ({"units": {"fc1": torch.ones(3).bool()}}, "'fc1' has 7 units"),
    ):
        with pytest.raises(ValueError, match=words):
            adapt_(net, DATA, **options)
    with pytest.raises(ValueError, match="iterator"):
        adapt_(net, iter(DATA))
    calls = []

    def loss(output, labels):
        calls.append(1)
        return F.cross_entropy(output, labels) * (float("nan") if len(calls) == 3 else 1.0)

    with pytest.raises(ValueError, match="the loss is nan"):
        adapt_(net, DATA, epochs=2, margin=0.0, loss=loss)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
