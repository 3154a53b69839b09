"""Pruning during training: schedules, rewinding, regrowth, resuming, callbacks."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight.prune import (
    Cubic,
    Iterative,
    OneShot,
    Pruner,
    Then,
    lightning_callback,
    load_state_,
    masks,
    transformers_callback,
)

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.randn(12, 4, generator=torch.Generator().manual_seed(1))).argmax(1)


def make(kind=torch.optim.SGD, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
    usual = {"lr": 0.05, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.01}
    return net, kind(net.parameters(), **(usual | options))


def train(net, optimizer, pruner, steps):
    """Train; return the fraction of zeros of the weights after each step."""
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        optimizer.step()
        pruner.step()
        zeros = sum(int(net[i].weight.eq(0).sum()) for i in (0, 2))
        found.append(zeros / 320)
    return found


def test_schedules_say_when_and_how_far():
    assert [OneShot(0.5, 3).at(s) for s in range(1, 5)] == [None, None, 0.5, None]
    turns = Iterative(0.75, times=2, every=4)
    assert {s: turns.at(s) for s in range(1, 13) if turns.at(s) is not None} == {4: 0.5, 8: 0.75}
    cubic = Cubic(0.8, begin=10, end=20, every=4, initial=0.2)
    assert [s for s in range(1, 40) if cubic.at(s) is not None] == [10, 14, 18, 20]
    assert cubic.at(10) == pytest.approx(0.2) and cubic.at(20) == 0.8
    assert cubic.at(14) == pytest.approx(0.8 - 0.6 * 0.6**3)
    longer = Then(cubic, every=5, until=33)
    assert [s for s in range(21, 50) if longer.at(s) is not None] == [25, 30]
    assert longer.at(25) == 0.8 and longer.last == 33


@pytest.mark.parametrize(
    ("make_one", "words"),
    [
        (lambda: OneShot(1.5), "sparsity"),
        (lambda: OneShot(0.5, 0), "step"),
        (lambda: Iterative(0.5, 0, 5), "times"),
        (lambda: Cubic(0.5, 10, 5), "begin <= end"),
        (lambda: Cubic(0.5, 1, 5, initial=0.6), "initial <= final"),
        (lambda: Then(OneShot(0.5), 0, 5), "every"),
    ],
)
def test_unusable_schedules_are_refused(make_one, words):
    with pytest.raises(ValueError, match=words):
        make_one()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_gradual_pruning_only_ever_removes(kind):
    net, optimizer = make(kind, weight_decay=0.1)
    pruner = Pruner(net, optimizer, Cubic(0.8, 5, 25, every=5))
    zeros = train(net, optimizer, pruner, 40)
    assert zeros == sorted(zeros) and zeros[3] == 0 and zeros[-1] == pytest.approx(0.8)
    assert len(pruner.reports) == 5


def test_iterating_with_rewinding_goes_back_to_the_values_and_forgets_momentum():
    for rewind in ("init", 2):
        net, optimizer = make()
        start = copy.deepcopy(net.state_dict())
        pruner = Pruner(net, optimizer, Iterative(0.75, times=2, every=6), rewind=rewind)
        if rewind == 2:
            train(net, optimizer, pruner, 2)
            start = copy.deepcopy(net.state_dict())
            train(net, optimizer, pruner, 4)
        else:
            train(net, optimizer, pruner, 6)
        for name, mask in masks(net).items():
            value = net.get_parameter(name)
            assert torch.equal(value, start[name] * mask)
        assert not optimizer.state
        zeros = train(net, optimizer, pruner, 10)
        assert zeros[0] == 0.5 and zeros[-1] == 0.75


def test_regrowth_brings_weights_back_and_the_model_always_holds_zeros():
    net, optimizer = make(lr=0.2)
    schedule = Then(OneShot(0.7, 5), every=5, until=60)
    pruner = Pruner(net, optimizer, schedule, regrow=True)
    before = None
    returned = 0
    for _ in range(12):
        zeros = train(net, optimizer, pruner, 5)
        assert zeros[-1] == pytest.approx(0.7, abs=0.01)
        now = masks(net)["0.weight"].clone()
        if before is not None:
            returned += int((now & ~before).sum())
        before = now
    assert returned > 0
    fixed = {n: m.clone() for n, m in masks(net).items()}
    train(net, optimizer, pruner, 10)  # beyond the schedule: masks stay
    assert all(torch.equal(fixed[n], m) for n, m in masks(net).items())
    assert net[0].weight[~fixed["0.weight"]].eq(0).all()


def test_dropped_weights_go_on_with_the_gradient_at_zero():
    net, optimizer = make(momentum=0.0, lr=0.1)
    pruner = Pruner(net, optimizer, Then(OneShot(0.5, 1), 100, 200), regrow=True, layers="0")
    train(net, optimizer, pruner, 1)
    dense = pruner.state_dict()["dropped"]["0.weight"]
    optimizer.zero_grad()
    F.cross_entropy(net(X), Y).backward()
    grad = net[0].weight.grad.clone()
    optimizer.step()
    after = pruner.state_dict()["dropped"]["0.weight"]
    torch.testing.assert_close(after, dense - 0.1 * grad)
    mask = masks(net)["0.weight"]
    assert torch.equal(net[0].weight, after * mask)


@pytest.mark.parametrize("regrow", [False, True])
def test_a_run_goes_on_where_it_was_saved(regrow):
    schedule = Then(Cubic(0.6, 3, 12, every=3), every=3, until=40)

    def fresh():
        net, optimizer = make()
        return net, optimizer, Pruner(net, optimizer, schedule, regrow=regrow)

    net, optimizer, pruner = fresh()
    train(net, optimizer, pruner, 20)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    train(net, optimizer, pruner, 20)
    again, other, second = fresh()
    load_state_(again, saved[0])
    other.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    train(again, other, second, 20)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())


def test_a_failure_leaves_the_model_as_it_was():
    net, optimizer = make()
    pruner = Pruner(net, optimizer, Then(OneShot(0.5, 2), 2, 20), regrow=True)
    train(net, optimizer, pruner, 3)
    pruner.importance = "no such"
    optimizer.zero_grad()
    F.cross_entropy(net(X), Y).backward()
    optimizer.step()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="unknown importance"):
        pruner.step()
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], v) for k, v in after.items())


def test_unusable_arguments_are_refused():
    net, optimizer = make()
    for options, words in (
        ({"rewind": "init", "regrow": True}, "exclude"),
        ({"rewind": 3}, "first pruning"),
        ({"rewind": "end"}, "first pruning"),
        ({"data": iter([X])}, "not an iterator"),
    ):
        with pytest.raises(ValueError, match=words):
            Pruner(net, optimizer, OneShot(0.5, 2), **options)


def test_lightning_counts_optimizer_steps(monkeypatch):
    module = types.ModuleType("lightning.pytorch")
    module.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)
    net, optimizer = make()
    callback = lightning_callback(lambda m, o: Pruner(m, o, OneShot(0.5, 2)))
    trainer = types.SimpleNamespace(optimizers=[optimizer], global_step=0)
    callback.on_fit_start(trainer, net)
    for trainer.global_step in (0, 1, 1, 2):
        callback.on_train_batch_end(trainer, net, None, None, 0)
    assert callback.pruner.count == 2 and float(net[0].weight.eq(0).float().mean()) == 0.5
    other = lightning_callback(lambda m, o: Pruner(m, o, OneShot(0.5, 2)))
    other.load_state_dict(callback.state_dict())
    other.on_fit_start(trainer, net)
    assert other.pruner.count == 2


def test_transformers_counts_optimizer_steps(monkeypatch):
    module = types.ModuleType("transformers")
    module.TrainerCallback = type("TrainerCallback", (), {})
    monkeypatch.setitem(sys.modules, "transformers", module)
    net, optimizer = make()
    callback = transformers_callback(lambda m, o: Pruner(m, o, OneShot(0.5, 2)))
    wrapped = types.SimpleNamespace(optimizer=optimizer)
    callback.on_train_begin(None, None, None, model=net, optimizer=wrapped)
    assert callback.pruner.optimizer is optimizer
    for _ in range(2):
        callback.on_step_end(None, None, None)
    assert float(net[2].weight.eq(0).float().mean()) == 0.5
