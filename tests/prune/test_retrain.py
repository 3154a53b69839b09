from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from liveweight.prune import masks, prune_, recalibrate_bn_, rewind_

DATA = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) + i for i in range(4)]


def test_recalibration_is_the_plain_average_over_batches(nets):
    model = nets.ConvNet().train()
    model.fc1.eval()
    seen = [model.conv1(x).detach() for x in DATA]
    weights = copy.deepcopy(dict(model.named_parameters()))
    assert recalibrate_bn_(model, DATA) == 1
    means = torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0)
    variances = torch.stack([s.var((0, 2, 3)) for s in seen]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, means)
    torch.testing.assert_close(model.bn1.running_var, variances)
    assert model.bn1.momentum == 0.1 and model.bn1.training and not model.fc1.training
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_recalibration_honours_steps_and_models_without_batch_norm(nets):
    model = nets.ConvNet()
    recalibrate_bn_(model, iter(DATA), steps=2)
    assert int(model.bn1.num_batches_tracked) == 2
    assert recalibrate_bn_(nets.Mlp(3, 2), []) == 0


@pytest.mark.parametrize(
    ("data", "error"),
    [([], ValueError), ([DATA[0], torch.randn(2, 9, 8, 8)], RuntimeError)],
)
def test_a_failed_recalibration_changes_nothing(nets, data, error):
    model = nets.ConvNet().train()
    before = nets.state_of(model)
    with pytest.raises(error):
        recalibrate_bn_(model, data)
    assert nets.same_state(before, nets.state_of(model)) and model.bn1.momentum == 0.1


def test_rewind_loads_the_initial_values_under_the_masks(nets):
    model = nets.ConvNet()
    initial = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        model.bn1.bias[0] = -100.0
    prune_(model, DATA, alpha=0.7)
    before = {n: m.clone() for n, m in masks(model).items()}
    rewind_(model, initial)
    for name, value in initial.items():
        if name in before:
            expected = torch.where(before[name], value, torch.zeros_like(value))
            assert torch.equal(model.state_dict()[name], expected)
        else:
            assert torch.equal(model.state_dict()[name], value)
    assert all(torch.equal(m, before[n]) for n, m in masks(model).items())


def test_rewinding_a_masked_residual_net(nets):
    model = nets.ResNet().eval()
    initial = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.block1.bn2.weight[0], model.block1.bn2.bias[0] = 0.0, 1e4
    prune_(model, DATA, alpha=0.9)
    mask = model.block1.shortcut[-1].mask.clone()
    assert not mask[0]
    rewind_(model, initial)
    assert torch.equal(model.block1.shortcut[-1].mask, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc1.weight"), "the state lacks 'fc1.weight'"),
        (lambda s: s.update({"fc9.weight": torch.ones(1)}), "the model has no 'fc9.weight'"),
        (lambda s: s.update({"fc1.weight": torch.ones(2, 2)}), r"has shape \[2, 2\]"),
    ],
)
def test_a_state_that_does_not_fit(nets, change, message):
    model = nets.ConvNet()
    state = {k: v + 1 for k, v in model.state_dict().items()}
    change(state)
    before = nets.state_of(model)
    with pytest.raises(ValueError, match=message):
        rewind_(model, state)
    assert nets.same_state(before, nets.state_of(model))


def test_a_model_wrapped_for_averaging_can_be_rewound(nets):
    model = nn.Sequential(nets.Mlp(3, 2))
    state = copy.deepcopy(model.state_dict())
    prune_(model, importance="magnitude", sparsity=0.5)
    rewind_(model, state)
    assert (model[0][0].weight != 0).sum() == 3
