from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight.prune import NNRelief, masks, prune_, score


def linear(weight, bias=None):
    weight = torch.as_tensor(weight, dtype=torch.float32)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(torch.as_tensor(bias))
    return layer


def test_linear_scores_are_the_mean_of_the_products():
    layer, x = nn.Linear(7, 5), torch.randn(40, 7)
    scores = score(nn.Sequential(layer), [x[:11], x[11:]])
    products = (layer.weight.double() * x.double()[:, None]).abs().mean(0).detach()  # [out, in]
    bias = layer.bias.detach().double().abs()
    total = products.sum(1) + bias
    torch.testing.assert_close(scores["0"].double(), products / total[:, None], rtol=1e-6, atol=0)
    torch.testing.assert_close(scores.bias["0"].double(), bias / total, rtol=1e-6, atol=0)


def test_extra_dimensions_are_samples():
    layer, x = nn.Linear(4, 3), torch.randn(6, 5, 4)
    folded = score(nn.Sequential(layer), [x.flatten(0, 1)])["0"]
    torch.testing.assert_close(score(nn.Sequential(layer), [x])["0"], folded)


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.9, 0.99])
def test_p0_and_the_error_guarantee(alpha):
    layer, x = nn.Linear(30, 20), F.relu(torch.randn(64, 30))
    weight, bias = layer.weight.detach().clone().double(), layer.bias.detach().clone().double()
    mass = torch.cat([weight.abs() * x.double().abs().mean(0), bias.abs()[:, None]], 1)
    prune_(nn.Sequential(layer), [x], importance=NNRelief(cleanup=False), alpha=alpha)
    bias_mask = getattr(layer, "bias_mask", torch.ones(20, dtype=torch.bool))
    keep = torch.cat([layer.weight_mask, bias_mask[:, None]], 1)
    total = mass.sum(1)
    kept = (mass * keep).sum(1)
    assert (kept >= alpha * total * (1 - 1e-6)).all()
    smallest = torch.where(keep, mass, torch.inf).amin(1)
    assert (kept - smallest < alpha * total).all()  # one fewer would not reach alpha
    assert (torch.where(keep, 0.0, mass).amax(1) <= smallest).all()
    dropped = (x.double() @ (weight * ~layer.weight_mask).T + bias * ~bias_mask).abs().mean(0)
    assert (dropped <= (1 - alpha) * total * (1 + 1e-6)).all()


def test_five_equal_scores():
    x = torch.ones(3, 5)
    for ties, kept in (("stable", 3), ("authors", 0)):
        model = nn.Sequential(linear(torch.ones(1, 5)))
        prune_(model, [x], importance=NNRelief(ties=ties), alpha=0.6)
        assert int(model[0].weight_mask.sum()) == kept
    assert model[0].weight.abs().sum() == 0


def test_a_unit_with_one_input_is_protected_unless_the_authors_ask():
    for ties, kept in (("stable", 4), ("authors", 0)):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False))
        prune_(model, [torch.randn(2, 4, 5, 5)], importance=NNRelief(ties=ties), alpha=0.9)
        assert int(model[0].weight_mask.flatten(1).any(1).sum()) == kept


def test_convolutions_lose_whole_kernels():
    model = nn.Sequential(nn.Conv2d(8, 6, 3))
    prune_(model, [torch.randn(4, 8, 6, 6)], alpha=0.6)
    mask = model[0].weight_mask.flatten(2)
    assert torch.equal(mask.any(2), mask.all(2)) and not mask.all()


def test_alpha_one_keeps_all_that_carries_signal_and_alpha_zero_nothing():
    x = torch.randn(9, 6)
    x[:, 2] = 0
    model = nn.Sequential(nn.Linear(6, 3))
    prune_(model, [x], alpha=1.0)
    assert model[0].weight_mask.sum(0).tolist() == [3, 3, 0, 3, 3, 3]
    prune_(model, [x], alpha=0.0)
    assert not model[0].weight_mask.any() and not model[0].bias_mask.any()


def test_dead_units_lose_everything_and_their_batch_norm_entries(nets):
    model = nets.ConvNet()
    with torch.no_grad():
        model.bn1.weight.abs_()
        model.bn1.bias[2] = -100.0  # channel 2 never passes the ReLU
        model.fc1.bias[4] = -100.0  # neither does unit 4
    importance = NNRelief(cleanup=False)
    report = prune_(model, [torch.randn(8, 3, 8, 8)], importance=importance, alpha=0.9)
    assert not model.conv1.weight_mask[2].any() and not model.conv1.bias_mask[2]
    assert not model.fc1.weight_mask[4].any() and not model.fc1.bias_mask[4]
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert getattr(model.bn1, name)[2] == 0
    assert set(masks(model)) >= {"bn1.weight", "bn1.bias"}
    assert {r.name: r.dead_units for r in report.layers}["conv1"] == 1
    assert torch.all(model.bn1(model.conv1(torch.randn(4, 3, 8, 8)))[:, 2] == 0)


def test_a_unit_dead_under_hardsigmoid_stays(nets):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(F.hardsigmoid(self.a(x)))

    model = Gate()
    with torch.no_grad():
        model.a.bias[1] = -50.0  # hardsigmoid gives 0 here but 0.5 at 0
    prune_(model, [torch.randn(5, 3)], importance=NNRelief(cleanup=False), alpha=1.0)
    assert model.a.weight_mask[1].all()


def test_linears_see_the_pruned_convolutions(nets):
    torch.manual_seed(1)
    model, data = nets.ConvNet().eval(), [torch.randn(16, 3, 8, 8)]
    importance = NNRelief(cleanup=False)
    reference = nets.ConvNet()
    reference.load_state_dict(model.state_dict())
    prune_(reference, data, importance=importance, alpha={"conv": 0.6})
    expected = score(reference, data, importance=importance, layers="fc1")["fc1"]
    first = score(model, data, importance=importance, layers="fc1")["fc1"]
    assert not torch.allclose(first, expected)
    prune_(model, data, importance=importance, alpha={"conv": 0.6, "linear": 0.7})
    # The second Linear's input still comes from the unpruned first one of this call.
    mass = expected.float().sort(1, descending=True)
    assert int(model.fc1.weight_mask.sum()) <= mass.values.numel()
    rows = torch.cat([expected, score(reference, data, layers="fc1").bias["fc1"][:, None]], 1)
    order = rows.sort(1, descending=True)
    count = (order.values.cumsum(1) < 0.7).sum(1) + 1
    keep = torch.cat([model.fc1.weight_mask, model.fc1.bias_mask[:, None]], 1)
    alive = keep.any(1)
    assert torch.equal(keep.sum(1)[alive], count[alive])


def test_one_shot_iterators_serve_both_passes(nets):
    torch.manual_seed(0)
    model, data = nets.ConvNet(), [torch.randn(4, 3, 8, 8) for _ in range(3)]
    other = nets.ConvNet()
    other.load_state_dict(model.state_dict())
    prune_(model, iter(data), alpha=0.8)
    prune_(other, data, alpha=0.8)
    found, expected = masks(model), masks(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in found)


def test_backward_clean_up_crosses_the_flatten(nets):
    model, x = nets.ConvNet(), torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        model.conv2.bias.fill_(3.0)  # every channel is alive
        model.fc1.bias.fill_(3.0)
        model.fc1.weight[:, 8:12] = 0  # all the features of channel 2 of conv2
        model.fc2.weight[:, 3] = 0
    prune_(model, [x], alpha=1.0)
    assert not model.conv2.weight_mask[2].any() and not model.conv2.bias_mask[2]
    assert model.conv2.weight_mask[1].any()
    assert not model.fc1.weight_mask[3].any() and not model.fc1.bias_mask[3]


def test_clean_up_cascades_and_keeps_the_output():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)
    )  # fmt: skip
    with torch.no_grad():
        model[4].weight[:, 1] = 0
        model[2].weight[[0, 2], 3] = 0  # unit 3 of the first layer is read by unit 1 alone
    x = torch.randn(20, 4)
    before = model(x)
    prune_(model, [x], importance=NNRelief(), alpha=1.0)
    assert not model[2].weight_mask[1].any() and not model[0].weight_mask[3].any()
    torch.testing.assert_close(model(x), before)


def test_cleanup_can_be_left_out():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[2].weight[:, 1] = 0
        model[0].bias.fill_(5.0)
    prune_(model, [torch.rand(6, 4)], importance=NNRelief(cleanup=False), alpha=1.0)
    assert model[0].weight_mask[1].any()


def test_an_untraceable_model_is_pruned_with_a_note():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(x) if x.sum() > -1e9 else x

    report = prune_(Dynamic(), [torch.randn(4, 5)], alpha=0.7)
    assert any("cannot be traced" in note for note in report.notes)
    assert report.kept < report.total


def test_dense_counts(nets):
    for net, size, dense in (
        (nets.LeNet300, (2, 784), 266_610),
        (nets.LeNet5, (2, 1, 28, 28), 431_080),
    ):
        report = prune_(net(), [torch.rand(size)], alpha=0.9, dry_run=True)
        assert report.total == dense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "autors"}, "variant must be one of.*did you mean 'authors'"),
        ({"norm": "l2"}, "norm must be one of"),
        ({"ties": "random"}, "ties must be one of"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        NNRelief(**options)


def test_the_paper_variant_scores_kernels_only():
    with pytest.raises(ValueError, match="'0'.*whole kernels"):
        score(
            nn.Sequential(nn.Conv2d(1, 2, 3)), [torch.rand(2, 1, 5, 5)],
            importance=NNRelief(variant="paper"), granularity="weight",
        )  # fmt: skip
