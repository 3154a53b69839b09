from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from liveweight.prune import apply_masks_, copy_masks_, load_state_, masks, prune_, strip_


@pytest.fixture
def pruned(nets):
    model = nets.Mlp(6, 5, 3)
    prune_(model, importance="magnitude", sparsity=0.5)
    return model


def same_masks(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_masks_are_buffers_beside_zeros(pruned):
    found = masks(pruned)
    assert set(found) == {"0.weight", "2.weight"}
    assert "0.weight_mask" in pruned.state_dict()
    for name, mask in found.items():
        assert mask.dtype == torch.bool
        assert torch.equal(pruned.get_parameter(name) != 0, mask)


def test_copies_carry_masks(pruned, nets):
    for twin in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert same_masks(masks(twin), masks(pruned))
        assert torch.equal(twin[0].weight, pruned[0].weight)
    assert same_masks(masks(pruned.to(torch.bfloat16)), masks(copy.deepcopy(pruned)))
    assert pruned[0].weight_mask.dtype == torch.bool


def test_state_dict_round_trip(pruned, nets):
    file = io.BytesIO()
    torch.save(pruned.state_dict(), file)
    file.seek(0)
    fresh = nets.Mlp(6, 5, 3)
    load_state_(fresh, torch.load(file))
    assert same_masks(masks(fresh), masks(pruned))
    x = torch.randn(4, 6)
    assert torch.equal(fresh(x), pruned(x))


def test_a_state_that_does_not_fit_changes_nothing(pruned, nets):
    fresh = nets.Mlp(6, 4, 3)
    before = nets.state_of(fresh)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_state_(fresh, pruned.state_dict())
    assert nets.same_state(before, nets.state_of(fresh))
    with pytest.raises(ValueError, match="'9.weight_mask' belongs to no parameter"):
        load_state_(fresh, {"9.weight_mask": torch.ones(1).bool()})


def test_strip_makes_zeros_permanent(pruned):
    zeros = pruned[0].weight == 0
    strip_(pruned)
    assert masks(pruned) == {} and "0.weight_mask" not in pruned.state_dict()
    assert torch.equal(pruned[0].weight == 0, zeros)
    copy.deepcopy(pruned)


def test_apply_masks(nets):
    model = nets.Mlp(4, 3, 2)
    mask = torch.rand(3, 4) > 0.5
    apply_masks_(model, {"0.weight": mask})
    assert torch.equal(masks(model)["0.weight"], mask)
    assert (model[0].weight[~mask] == 0).all()
    apply_masks_(model, {"0.weight": torch.ones(3, 4).bool()})
    assert masks(model)["0.weight"].all()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"0.wieght": torch.ones(3, 4).bool()}, ValueError, "no parameter '0.wieght'.*'0.weight'"),
        (
            {"0.weight": torch.ones(4, 3).bool()},
            ValueError,
            r"\[4, 3\], the parameter has \[3, 4\]",
        ),
        ({"0.weight": torch.ones(3, 4)}, TypeError, "must be a bool tensor, got torch.float32"),
    ],
)
def test_bad_masks_change_nothing(nets, given, error, message):
    model = nets.Mlp(4, 3, 2)
    before = nets.state_of(model)
    with pytest.raises(error, match=message):
        apply_masks_(model, {"2.weight": torch.zeros(2, 3).bool()} | given)
    assert nets.same_state(before, nets.state_of(model))


@pytest.fixture
def torch_pruned(nets):
    model = nets.Mlp(6, 5, 3)
    torch_prune.l1_unstructured(model[0], "weight", 0.4)
    torch_prune.random_unstructured(model[0], "bias", 0.4)
    return model


def test_torch_prune_masks_are_read(torch_pruned):
    found = masks(torch_pruned)
    assert set(found) == {"0.weight", "0.bias"}
    assert torch.equal(found["0.weight"], torch_pruned[0].weight_mask.bool())


def test_torch_prune_masks_are_absorbed_and_parameters_stay(torch_pruned):
    x = torch.randn(4, 6)
    expected, before = torch_pruned(x), masks(torch_pruned)
    weight, bias = torch_pruned[0].weight_orig, torch_pruned[0].bias_orig
    prune_(torch_pruned, importance="magnitude", sparsity=0.0)
    layer = torch_pruned[0]
    assert layer.weight is weight and layer.bias is bias
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
    assert not layer._forward_pre_hooks and layer.weight_mask.dtype == torch.bool
    assert same_masks({k: v for k, v in masks(torch_pruned).items() if k in before}, before)
    torch.testing.assert_close(torch_pruned(x), expected, rtol=0, atol=0)
    assert not torch_prune.is_pruned(torch_pruned)


def test_pruning_starts_from_torch_prune_masks(torch_pruned):
    before = masks(torch_pruned)["0.weight"]
    prune_(torch_pruned, importance="random", sparsity=0.7)
    after = masks(torch_pruned)["0.weight"]
    assert not (after & ~before).any() and int(after.sum()) == 9


def test_a_dry_run_leaves_torch_prune_masks(torch_pruned, nets):
    before = nets.state_of(torch_pruned)
    weight = torch_pruned[0].weight
    prune_(torch_pruned, importance="magnitude", sparsity=0.5, dry_run=True)
    assert nets.same_state(before, nets.state_of(torch_pruned))
    assert torch_pruned[0].weight is weight and torch_prune.is_pruned(torch_pruned)


def test_strip_folds_torch_prune_masks(torch_pruned):
    x = torch.randn(4, 6)
    expected = torch_pruned(x)
    strip_(torch_pruned)
    assert masks(torch_pruned) == {} and isinstance(torch_pruned[0].weight, nn.Parameter)
    assert torch.equal(torch_pruned(x), expected)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("made", ["before", "after"])
def test_averaged_models(nets, made, use_buffers):
    model = nets.ConvNet()

    def average():
        return torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9),
            use_buffers=use_buffers,
        )  # fmt: skip

    averaged = average() if made == "before" else None
    if made == "before":
        averaged.update_parameters(model)
    prune_(model, importance="magnitude", sparsity=0.6)
    if made == "before":
        copy_masks_(model, averaged)
    else:
        averaged = average()
    for _ in range(3):
        averaged.update_parameters(model)
    assert same_masks(masks(averaged.module), masks(model))
    for name, mask in masks(model).items():
        assert (averaged.module.get_parameter(name)[~mask] == 0).all()
        assert (averaged.module.get_parameter(name)[mask] != 0).any()
