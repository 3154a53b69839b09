from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight.prune import keep_masks, masks, prune_
from liveweight.prune.keep import _Zeros


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(16, 3, 8, 8, generator=generator),
            torch.randint(4, (16,), generator=generator),
        )
        for _ in range(count)
    ]


def train(model, optimizer, autocast=False, scaler=None, data=None):
    model.train()
    for x, y in data or batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def revived(model):
    """How many masked entries are not exactly zero."""
    return sum(int((model.get_parameter(n)[~m] != 0).sum()) for n, m in masks(model).items())


@pytest.fixture
def model(nets):
    model = nets.ConvNet()
    prune_(model, [x for x, _ in batches()], alpha=0.7)
    return model


OPTIMIZERS = {
    "sgd momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "sgd nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=1e-1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=1e-1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=1e-1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_and_state_stay_exact(model, name):
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, data=batches(2))  # momentum from before the masks are kept
    keep_masks(model, optimizer)
    train(model, optimizer)
    assert revived(model) == 0
    for parameter_name, mask in masks(model).items():
        parameter = model.get_parameter(parameter_name)
        assert (parameter[mask] != 0).any() or not mask.any()
        for value in optimizer.state[parameter].values():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                assert (value[~mask] == 0).all()


@pytest.mark.parametrize("kept", [True, False])
def test_an_epoch_of_adamw_with_weight_decay_under_autocast(model, kept):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1e-1)
    if kept:
        keep_masks(model, optimizer)
    train(model, optimizer, autocast=True)
    # Without keep_masks the same epoch must bring weights back, or the test shows nothing.
    assert (revived(model) == 0) is kept


def test_a_grad_scaler_steps_through(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    keep_masks(model, optimizer)
    before = model.fc1.weight.clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    train(model, optimizer, autocast=True, scaler=scaler)
    assert revived(model) == 0 and not torch.equal(before, model.fc1.weight)


def test_a_closure_computes_gradients_inside_the_step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    keep_masks(model, optimizer)
    model.train()
    for x, y in batches():

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert revived(model) == 0
    weight = model.fc1.weight
    assert (optimizer.state[weight]["momentum_buffer"][~model.fc1.weight_mask] == 0).all()


def test_dead_batch_norm_entries_stay_silent(nets):
    model = nets.ResNet()
    with torch.no_grad():
        model.block1.bn1.bias[1] = -100.0
    prune_(model, [x for x, _ in batches()], alpha=0.8)
    assert not model.block1.bn1.weight_mask[1]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    keep_masks(model, optimizer)
    train(model, optimizer)
    assert revived(model) == 0 and model.block1.bn1.bias[1] == 0


def test_later_pruning_and_loaded_state_are_followed(model):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    keep_masks(model, optimizer)
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    prune_(model, [x for x, _ in batches()], alpha=0.6)
    optimizer.load_state_dict(saved)
    train(model, optimizer)
    assert revived(model) == 0
    state = optimizer.state[model.fc1.weight]
    assert (state["exp_avg"][~model.fc1.weight_mask] == 0).all()


def test_remove(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = keep_masks(model, optimizer)
    train(model, optimizer)
    assert revived(model) == 0
    handle.remove()
    train(model, optimizer)
    assert revived(model) > 0


def test_torch_prune_masks_are_kept_out_of_the_state():
    model = nn.Sequential(nn.Linear(4, 3))
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    keep_masks(model, optimizer)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert (model[0].weight_orig[model[0].weight_mask == 0] == 0).all()


def test_a_foreign_optimizer(model):
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)
    with pytest.raises(ValueError, match="holds none of the model's masked parameters"):
        keep_masks(model, other)
    with pytest.raises(TypeError, match="needs a module and an optimizer"):
        keep_masks(other, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zeros_are_set_whatever_the_entry_was(dtype):
    mask = torch.rand(3, 5, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    like = torch.ones(mask.shape).to(dtype)
    zeros = _Zeros(mask, like)
    for layout in (torch.contiguous_format, torch.channels_last):
        values = torch.randn(mask.shape)
        values[0], values[1] = float("nan"), -float("inf")
        values = values.to(dtype).contiguous(memory_format=layout)
        expected = torch.where(mask, values.float(), torch.zeros(()))
        zeros.clear_(values)
        torch.testing.assert_close(values.float(), expected, rtol=0, atol=0, equal_nan=True)
        assert not torch.signbit(values.float()[~mask]).any(), "plain zeros, not negative ones"


def test_zeros_of_state_in_another_dtype():
    mask = torch.tensor([True, False])
    state = torch.tensor([2.0, 3.0], dtype=torch.float64)
    _Zeros(mask, torch.ones(2)).clear_(state)
    assert state.tolist() == [2.0, 0.0]
