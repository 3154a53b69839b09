"""Importances from weights, activations and gradients, against loops and closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune

from liveweight.prune import (
    Obd,
    ObdSd,
    Ria,
    importances,
    masks,
    prune_,
    score,
)

WITHOUT_DATA = ("magnitude", "random", "lamp")
LABELLED = ("snip", "taylor", "obd", "obd_sd")


def make(seed=0):
    """A net with a grouped, padded, strided convolution and two Linears, its data and labels."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3),
    ).double()  # fmt: skip
    x, y = torch.randn(14, 2, 5, 5).double(), torch.randint(0, 3, (14,))
    return net.eval(), [(x[:8], y[:8]), (x[8:], y[8:])]


def whole(data):
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def layer_input(net, name, data):
    x, _ = whole(data)
    for key, module in net.named_children():
        if key == name:
            return x.detach()
        x = module(x)


def test_magnitude_keeps_what_torch_keeps():
    net, _ = make()
    twin = nn.Linear(36, 5).double()
    twin.load_state_dict(net[3].state_dict())
    torch_prune.l1_unstructured(twin, "weight", amount=0.7)
    prune_(net, importance="magnitude", sparsity=0.7, layers="3")
    assert torch.equal(masks(net)["3.weight"], twin.weight_mask.bool())


def test_lamp_is_the_share_of_the_squares_no_smaller():
    net, _ = make()
    w = net[3].weight.detach().flatten()
    w[3] = w[7]  # equal weights count in the order of their index
    w[5] = 0.0
    got = score(net, importance="lamp")["3"].flatten()
    for k in range(len(w)):
        after = [j for j in range(len(w)) if (w[j].abs(), j) >= (w[k].abs(), k)]
        want = w[k] ** 2 / sum(w[j] ** 2 for j in after)
        assert got[k] == pytest.approx(float(want), rel=1e-6)
    assert got.max() == 1


def test_lamp_of_a_layer_of_zeros_is_zero():
    net = nn.Sequential(nn.Linear(3, 2))
    nn.init.zeros_(net[0].weight)
    assert torch.equal(score(net, importance="lamp")["0"], torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["wanda", "ria"])
def test_norms_of_what_each_weight_reads(name):
    net, data = make()
    found = score(net, data, importance=name)
    x = layer_input(net, "3", data)
    w = net[3].weight.detach().abs()
    norm = x.square().mean(0).sqrt()
    if name == "ria":
        w, norm = w / w.sum(0) + w / w.sum(1, keepdim=True), norm.sqrt()
    torch.testing.assert_close(found["3"], w * norm, rtol=1e-5, atol=0)
    # The response of one weight alone, by convolving with everything else set to zero.
    conv, maps = net[0], layer_input(net, "0", data)
    size = conv.weight.detach().abs()
    relative = torch.zeros_like(size)
    for o in range(4):
        mates = [p for p in range(4) if p // 2 == o // 2]
        relative[o] = size[o] / size[o].sum() + size[o] / size[mates].sum(0)
    for o, i, r, s in [(0, 0, 0, 0), (1, 0, 2, 1), (3, 0, 1, 1), (2, 0, 2, 2)]:
        one = torch.zeros_like(conv.weight)
        one[o, i, r, s] = 1.0
        read = F.conv2d(maps, one, stride=2, padding=1, groups=2)
        norm = read.square().sum((1, 2, 3)).mean().sqrt()
        want = size[o, i, r, s] * norm
        want = relative[o, i, r, s] * norm.sqrt() if name == "ria" else want
        assert found["0"][o, i, r, s] == pytest.approx(float(want), rel=1e-5)


def test_ria_without_the_input_is_relative_importance():
    net, data = make()
    w = net[5].weight.detach().abs()
    got = score(net, data, importance=Ria(a=0))["5"]
    torch.testing.assert_close(got, w / w.sum(0) + w / w.sum(1, keepdim=True), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="a must be finite"):
        Ria(a=-1)


def test_snip_is_the_derivative_by_a_gate():
    net, data = make()
    x, y = whole(data)
    found = score(net, data, importance="snip")
    by_kernel = score(net, data, importance="snip", granularity="kernel")
    step = 1e-6

    def change(name, place):
        weight = net.get_submodule(name).weight
        keep = weight.detach().clone()
        losses = []
        for gate in (1 + step, 1 - step):
            with torch.no_grad():
                weight[place] = keep[place] * gate
                losses.append(F.cross_entropy(net(x), y))
                weight.copy_(keep)
        return abs(float(losses[0] - losses[1])) / (2 * step)

    for name, place in [("3", (1, 4)), ("5", (2, 3)), ("0", (1, 0, 2, 1))]:
        assert found[name][place] == pytest.approx(change(name, place), rel=1e-4)
    assert by_kernel["0"][3, 0] == pytest.approx(change("0", (3, 0)), rel=1e-4)


def test_taylor_is_the_mean_over_batches_of_the_squared_change():
    net, data = make()
    want = 0
    for x, y in data:
        (g,) = torch.autograd.grad(F.cross_entropy(net(x), y), net[0].weight)
        want = want + (g * net[0].weight.detach()).flatten(2).sum(2).square() / len(data)
    got = score(net, data, importance="taylor", granularity="kernel")["0"]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def per_sample(net, data, name):
    x, y = whole(data)
    weight = net.get_submodule(name).weight
    losses = (F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]) for i in range(len(x)))
    return torch.stack([torch.autograd.grad(loss, weight)[0] for loss in losses])


def test_obd_with_the_fisher_curvature_squares_per_sample_gradients():
    net, data = make()
    found = score(net, data, importance="obd")
    for name in ("0", "3", "5"):
        w = net.get_submodule(name).weight.detach()
        want = 0.5 * per_sample(net, data, name).square().mean(0) * w.square()
        torch.testing.assert_close(found[name], want, rtol=1e-6, atol=1e-15)


def test_obd_exact_is_the_second_difference_of_the_loss():
    net, data = make()
    x, y = whole(data)
    found = score(net, data, importance=Obd("exact"))
    step = 1e-4
    for name, place in [("0", (1, 0, 2, 1)), ("3", (2, 7)), ("5", (0, 4)), ("5", (2, 2))]:
        weight = net.get_submodule(name).weight
        middle, losses = float(weight.detach()[place]), []
        for value in (middle - step, middle, middle + step):
            with torch.no_grad():
                weight[place] = value
                losses.append(float(F.cross_entropy(net(x), y)))
                weight[place] = middle
        h = (losses[0] - 2 * losses[1] + losses[2]) / step**2
        want = max(0.0, 0.5 * h * middle**2)
        assert float(found[name][place]) == pytest.approx(want, rel=1e-3, abs=1e-7)


def test_gauss_newton_is_exact_where_outputs_are_linear_in_the_weights():
    net, data = make()
    exact = score(net, data, importance=Obd("exact"))
    close = score(net, data, importance=Obd("gauss_newton"))
    torch.testing.assert_close(close["5"], exact["5"], rtol=1e-6, atol=1e-12)
    assert not torch.allclose(close["0"], exact["0"])  # a tanh lies between


def test_obd_sd_in_both_readings():
    net, data = make()
    w = net[3].weight.detach()
    g = per_sample(net, data, "3")
    change = -g * w + 0.5 * g.square() * w.square()
    spread = change.std(0, correction=0)
    got = score(net, data, importance=ObdSd("standard-deviation", beta=2.0))["3"]
    want = (change.mean(0) + 2 * spread).clamp_min(0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-12)
    got = score(net, data, importance=ObdSd("signed-derivative"))["3"]
    torch.testing.assert_close(got, change.mean(0).abs(), rtol=1e-5, atol=1e-12)


def test_a_loss_of_ones_own_decides():
    net, data = make()
    x, y = whole(data)

    def loss(output, labels):
        return (output[:, 0] * labels).mean()

    g = torch.autograd.grad(loss(net(x), y), net[5].weight)[0]
    got = score(net, data, importance=importances["snip"](loss=loss))["5"]
    torch.testing.assert_close(got, (g * net[5].weight.detach()).abs(), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("name", LABELLED)
def test_what_needs_labels_says_so_and_changes_nothing(name):
    net, data = make()
    net.train()
    before = {n: p.clone() for n, p in net.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{name}' needs data.*\(input, labels\)"):
        prune_(net, importance=name, sparsity=0.5)
    for bad in ([x for x, _ in data], [(x,) for x, _ in data]):
        with pytest.raises(ValueError, match=f"{name}' needs labels"):
            prune_(net, bad, importance=name, sparsity=0.5)
    with pytest.raises(ValueError, match="8 samples but 3 labels"):
        prune_(net, [(data[0][0], data[0][1][:3])], importance=name, sparsity=0.5)
    with pytest.raises(ValueError, match="data is empty"):
        prune_(net, [], importance=name, sparsity=0.5)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        prune_(net, data, importance=name, sparsity=0.5)
    nan = [(torch.full_like(x, float("nan")), y) for x, y in data]
    with pytest.raises(ValueError, match="loss"):
        prune_(net, nan, importance=name, sparsity=0.5)
    assert net.training and not masks(net)
    assert all(torch.equal(before[n], p) for n, p in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", LABELLED)
def test_gradients_are_found_under_no_grad_and_for_frozen_weights(name):
    net, data = make()
    want = score(net, data, importance=name)
    net.requires_grad_(False)
    with torch.no_grad():
        got = score(net, data, importance=name)
    for layer in want:
        torch.testing.assert_close(got[layer], want[layer])
        assert not got[layer].requires_grad
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", importances)
@pytest.mark.parametrize("granularity", ["weight", "kernel", "block", "vnm", "neuron"])
def test_every_importance_cuts_at_every_granularity_that_it_scores(name, granularity):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8),
        nn.ReLU(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    data = [(torch.randn(6, 4, 4, 4), torch.randint(0, 4, (6,)))]
    options = {
        "block": {"block": (2, 2), "sparsity": 0.5},
        "vnm": {"pattern": (2, 2, 4)},
    }.get(granularity, {"sparsity": 0.5})
    units = name in ("apoz", "firing_rate", "dropout_damage")
    if units and granularity != "neuron":
        with pytest.raises(ValueError, match="scores whole units"):
            prune_(net, data, importance=name, granularity=granularity, **options)
        return
    if name == "sparsegpt" and granularity != "weight":
        with pytest.raises(ValueError, match="sparsegpt"):
            prune_(net, data, importance=name, granularity=granularity, **options)
        return
    report = prune_(net, data, importance=name, granularity=granularity, **options)
    pruned = [r for r in report.layers if not r.note]
    assert len(pruned) == (2 if granularity == "neuron" else 3)
    for r in pruned:  # nnrelief then drops what nothing reads any more
        assert r.kept == r.total // 2 or (name == "nnrelief" and 0 < r.kept < r.total // 2)


@pytest.mark.parametrize("name", [n for n in importances if n not in WITHOUT_DATA])
def test_all_zero_inputs_give_scores_and_a_cut(name):
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    nn.init.zeros_(net[0].bias)
    data = [(torch.zeros(5, 6), torch.randint(0, 3, (5,)))]
    report = prune_(net, data, importance=name, sparsity=0.5, layers="0")
    assert report.layers[0].kept == 12
