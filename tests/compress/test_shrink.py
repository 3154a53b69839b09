"""shrink_ removes what cannot matter, keeps what could, and never changes the outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from liveweight.compress import shrink_


def zero_(parameter, *index):
    with torch.no_grad():
        parameter[index if len(index) > 1 else index[0]] = 0.0


def same(model, dense, x, atol=1e-5):
    return torch.allclose(model(x), dense(x), atol=atol, rtol=1e-5)


@pytest.fixture
def lenet(nets):
    return nets.settle(nets.LeNet()), torch.randn(3, 1, 16, 16)


def test_units_nobody_reads_go(lenet):
    model, x = lenet
    zero_(model.features[3].weight, slice(None), [1, 4])
    zero_(model.classifier[3].weight, slice(None), [0, 30])
    dense = copy.deepcopy(model)
    report = shrink_(model, x)
    assert model.features[0].weight.shape == (6, 1, 3, 3)
    assert model.features[3].weight.shape == (16, 6, 3, 3)
    assert (model.features[0].out_channels, model.features[3].in_channels) == (6, 6)
    assert (model.classifier[1].out_features, model.classifier[3].in_features) == (30, 30)
    assert report.removed == 4
    assert same(model, dense, x)


def test_flatten_maps_a_channel_to_its_fan_of_features(lenet):
    model, x = lenet
    fc = model.classifier[1]
    zero_(fc.weight, slice(None), slice(4 * 5, 4 * 6))  # every position of channel 5
    zero_(fc.weight, slice(None), 4 * 7)  # one position of channel 7: still read
    dense = copy.deepcopy(model)
    shrink_(model, x)
    assert model.features[3].out_channels == 15
    assert fc.in_features == 60 and fc.weight.shape == (32, 60)
    assert same(model, dense, x)


def test_constants_fold_into_the_next_bias(lenet):
    model, x = lenet
    zero_(model.features[0].weight, 2)  # constant relu(bias): follower does not pad
    model.features[0].bias.data[2] = 1.5
    zero_(model.features[3].weight, 3)
    model.features[3].bias.data[3] = 0.7  # folds through pool and flatten into the Linear
    zero_(model.classifier[1].weight, 9)
    model.classifier[1].bias.data[9] = -1.0  # relu makes it 0: nothing to fold
    dense = copy.deepcopy(model)
    report = shrink_(model, x)
    rows = {row.name: row for row in report.layers}
    assert [rows[n].folded for n in ("features.0", "features.3", "classifier.1")] == [1, 1, 0]
    assert rows["classifier.1"].units_after == 31
    assert same(model, dense, x)
    assert same(model, dense, torch.randn(2, 1, 16, 16))  # not only on the example


def test_fold_is_exact_in_double(nets):
    model = nets.settle(nets.FunctionalNet()).double()
    zero_(model.fc1.weight, [2, 5])
    model.fc1.bias.data[[2, 5]] = torch.tensor([0.25, 3.0], dtype=torch.float64)
    expected = model.fc2.bias + model.fc2.weight[:, [2, 5]] @ model.fc1.bias[[2, 5]]
    shrink_(model, torch.randn(1, 12, dtype=torch.float64))
    assert torch.allclose(model.fc2.bias, expected, rtol=1e-15, atol=0)


def test_follower_without_bias_gets_one(nets):
    model = nets.settle(nets.FunctionalNet(bias=False))
    zero_(model.fc1.weight, 4)
    model.fc1.bias.data[4] = 2.0
    dense = copy.deepcopy(model)
    x = torch.randn(4, 12)
    report = shrink_(model, x)
    assert model.fc2.bias is not None and model.fc3.bias is None
    assert "fc2: got a bias" in report.table()
    assert same(model, dense, x)


def test_fold_reopens_a_pruned_bias(nets):
    model = nets.settle(nets.FunctionalNet())
    zero_(model.fc1.weight, 4)
    model.fc1.bias.data[4] = 2.0
    model.fc2.bias.data[:2] = 0.0
    model.fc2.register_buffer("bias_mask", torch.tensor([False, False] + [True] * 6))
    shrink_(model, torch.randn(4, 12))
    assert model.fc2.bias_mask.all()


def test_norm_follows_its_layer(nets):
    model = nets.settle(nets.NormNet())
    zero_(model.conv2.weight, slice(None), 3)
    zero_(model.bn1.weight, 5)  # a zero scale: the channel is its shift
    zero_(model.conv2.weight, 7)  # constant through BatchNorm, relu and pool
    dense = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8)
    shrink_(model, x)
    assert model.conv1.out_channels == model.bn1.num_features == 6
    assert (
        model.bn1.running_mean.shape == model.bn1.running_var.shape == model.bn1.bias.shape == (6,)
    )
    assert model.bn2.num_features == model.conv2.out_channels == 11
    assert same(model, dense, x)


def test_zero_padding_stops_a_fold_but_not_a_zero(nets):
    model = nets.settle(nets.NormNet(padding=1))
    zero_(model.conv1.weight, [1, 2])
    with torch.no_grad():  # relu(bn(0)): channel 1 is positive, channel 2 zero
        model.bn1.running_mean[[1, 2]] = 0.0
        model.bn1.bias[[1, 2]] = torch.tensor([1.0, -1.0])
    dense = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    report = shrink_(model, x)
    assert model.conv1.out_channels == 7
    assert "kept 1 constant unit: conv2 pads with zeros" in report.table()
    assert same(model, dense, x)


def test_removals_cascade_in_both_directions(nets):
    model = nets.settle(nets.FunctionalNet())
    with torch.no_grad():
        model.fc3.weight[:, 6:] = 0.0  # fc2 units 6, 7 unread
        model.fc2.weight[:6, 10:] = 0.0  # fc1 units 10.. only read by those
    dense = copy.deepcopy(model)
    x = torch.randn(4, 12)
    shrink_(model, x)
    assert (model.fc1.out_features, model.fc2.out_features) == (10, 6)
    assert same(model, dense, x)


def test_masks_are_cut_along(nets, lenet):
    model, x = lenet
    nets.sparsify(model, 0.3)
    zero_(model.features[3].weight, slice(None), 1)
    model.features[3].weight_mask[:, 1] = False
    model.features[0].register_buffer("bias_mask", torch.ones(8, dtype=torch.bool))
    shrink_(model, x)
    for layer in (model.features[0], model.features[3], model.classifier[1]):
        assert layer.weight_mask.shape == layer.weight.shape
        assert not layer.weight[~layer.weight_mask].any()
    assert model.features[0].bias_mask.shape == model.features[0].bias.shape


def test_a_layer_keeps_one_unit(nets):
    model = nets.settle(nets.FunctionalNet())
    with torch.no_grad():
        model.fc2.weight.zero_()
    dense = copy.deepcopy(model)
    x = torch.randn(4, 12)
    report = shrink_(model, x)
    assert model.fc1.out_features == 1 and model.fc2.out_features == 1
    assert "at least one" in report.table()
    assert same(model, dense, x)


def test_second_call_finds_nothing(lenet):
    model, x = lenet
    zero_(model.features[3].weight, slice(None), [1, 4])
    shrink_(model, x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = shrink_(model, x)
    assert report.removed == 0 and report.parameters_before == report.parameters_after
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_residual_channels_are_left_alone(nets):
    model = nets.settle(nets.ResidualNet())
    zero_(model.conv2.weight, 1)
    model.conv2.bias.data[1] = 0.0
    zero_(model.conv2.weight, slice(None), 2)  # inside the block: conv1's channel may go
    dense = copy.deepcopy(model)
    x = torch.randn(2, 4, 6, 6)
    report = shrink_(model, x)
    rows = {row.name: row for row in report.layers}
    assert "residual add" in rows["stem"].note and "residual add" in rows["conv2"].note
    assert rows["stem"].units_after == rows["conv2"].units_after == 6
    assert rows["conv1"].units_after == 5
    assert same(model, dense, x)


def test_untraceable_model_is_left_alone(nets):
    model = nets.BranchingNet()
    zero_(model.fc2.weight, slice(None), 1)
    report = shrink_(model, torch.randn(2, 6))
    assert model.fc1.out_features == 8
    assert "cannot be traced" in report.table()


def test_unsupported_neighbours_are_named(nets):
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.Linear(8, 2))
    zero_(shared.weight, slice(None), 1)
    zero_(model[5].weight, slice(None), 1)
    report = shrink_(model, torch.randn(2, 8))
    assert shared.in_features == 8 and model[0].out_features == 8
    assert "called more than once" in report.table()


def test_tied_and_torch_pruned_weights_are_named(nets):
    model = nets.FunctionalNet()
    zero_(model.fc2.weight, slice(None), 1)
    prune.identity(model.fc1, "weight")
    report = shrink_(model, torch.randn(2, 12))
    assert "torch.nn.utils.prune" in report.table() and model.fc1.out_features == 16

    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    tied[2].weight = tied[0].weight
    zero_(tied[2].weight, slice(None), 1)
    report = shrink_(tied, torch.randn(2, 8))
    assert "shares a parameter" in report.table() and tied[0].out_features == 8


def test_failed_check_restores_the_model(lenet, monkeypatch):
    model, x = lenet
    zero_(model.features[3].weight, slice(None), [1, 4])
    weight, state = model.features[0].weight, copy.deepcopy(model.state_dict())
    monkeypatch.setattr("liveweight.compress.shrink.difference", lambda a, b: "values differ")
    with pytest.raises(RuntimeError, match="disagrees on example_inputs: values differ"):
        shrink_(model, x)
    assert model.features[0].weight is weight and model.features[0].out_channels == 8
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_training_mode_and_gradients_survive(lenet):
    model, x = lenet
    zero_(model.features[3].weight, slice(None), [1, 4])
    model.train()
    model.features[0].weight.requires_grad_(False)
    shrink_(model, x)
    assert model.training and model.features[0].training
    assert not model.features[0].weight.requires_grad and model.features[3].weight.requires_grad
    model(x).sum().backward()
    assert model.features[3].weight.grad.shape == model.features[3].weight.shape
    copy.deepcopy(model)(x)


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ("x", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
        ((), ValueError, "holds no tensor"),
        (torch.empty(0, 12), ValueError, "empty"),
        (torch.empty(1, 12, device="meta"), ValueError, "is on meta, the model on cpu"),
    ],
)
def test_bad_inputs(nets, inputs, error, words):
    with pytest.raises(error, match=words):
        shrink_(nets.FunctionalNet(), inputs)


def test_bad_model():
    with pytest.raises(TypeError, match="must be an nn.Module"):
        shrink_({"a": 1}, torch.randn(1))


def test_arguments_by_keyword(nets):
    model = nets.FunctionalNet()
    zero_(model.fc2.weight, slice(None), 1)
    assert shrink_(model, {"x": torch.randn(2, 12)}).removed == 1
