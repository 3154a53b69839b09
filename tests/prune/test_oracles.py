"""Importances against computations of another kind: enumeration, inverses, torch's own pruning."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune

from liveweight.prune import (
    DropoutDamage,
    ObdSd,
    Random,
    SparseGpt,
    importances,
    masks,
    prune_,
    score,
)


def make(seed=0):
    """A net with a grouped convolution and two Linears in float64, and labelled batches."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3),
    ).double()  # fmt: skip
    x, y = torch.randn(20, 2, 5, 5).double(), torch.randint(0, 3, (20,))
    return net.eval(), [(x[:12], y[:12]), (x[12:], y[12:])]


def test_magnitude_over_the_model_is_torchs_global_pruning():
    net, _ = make()
    twin, _ = make()
    chosen = [(twin[i], "weight") for i in (0, 3, 5)]
    torch_prune.global_unstructured(chosen, torch_prune.L1Unstructured, amount=0.6)
    prune_(net, importance="magnitude", sparsity=0.6, scope="global")
    for i in (0, 3, 5):
        assert torch.equal(masks(net)[f"{i}.weight"], twin[i].weight_mask.bool())


def test_magnitude_of_whole_units_is_torchs_structured_pruning():
    net, _ = make()
    twin = make()[0][3]
    torch_prune.ln_structured(twin, "weight", amount=0.5, n=1, dim=0)
    prune_(net, importance="magnitude", granularity="neuron", sparsity=0.5, layers="3")
    assert torch.equal(net[3].weight.ne(0), twin.weight_mask.bool())


def test_random_scores_are_uniform_and_layers_do_not_follow_each_other():
    net = nn.Sequential(nn.Linear(120, 90), nn.Linear(90, 120), nn.Linear(120, 90))
    found = score(net, importance=Random(5))
    values = torch.cat([found[name].flatten() for name in ("0", "1", "2")]).sort().values
    steps = torch.arange(1, len(values) + 1) / len(values)
    assert (values - steps).abs().max() < 1.95 / len(values) ** 0.5  # Kolmogorov-Smirnov, 0.1 %
    pair = torch.stack([found["0"].flatten(), found["2"].flatten()])
    assert torch.corrcoef(pair)[0, 1].abs() < 4 / 90


def test_taylor_of_one_batch_is_the_square_of_a_gates_effect():
    net, data = make()
    x, y = data[0]
    found = score(net, [data[0]], importance="taylor")
    weight, place, step = net[3].weight, (2, 5), 1e-6
    start, losses = float(weight.detach()[place]), []
    for gate in (1 + step, 1 - step):
        with torch.no_grad():
            weight[place] = start * gate
            losses.append(float(F.cross_entropy(net(x), y)))
            weight[place] = start
    slope = (losses[0] - losses[1]) / (2 * step)
    assert float(found["3"][place]) == pytest.approx(slope**2, rel=1e-3)
    assert slope != 0


@pytest.mark.parametrize("reading", ["standard-deviation", "signed-derivative"])
@pytest.mark.parametrize("name", ["0", "5"])
def test_obd_sd_predicts_the_change_of_every_samples_loss(reading, name):
    net, data = make()
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    weight = net.get_submodule(name).weight
    losses = [F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]
    g = torch.stack([torch.autograd.grad(loss, weight)[0] for loss in losses])
    change = -g * weight.detach() + (g * weight.detach()).square() / 2
    want = change.mean(0).abs()
    if reading == "standard-deviation":
        want = (change.mean(0) + change.std(0, correction=0)).clamp_min(0)
    got = score(net, data, importance=ObdSd(reading))
    torch.testing.assert_close(got[name], want, rtol=1e-6, atol=1e-12)
    kernels = score(net, data, importance=ObdSd(reading), granularity="kernel")
    if name == "0":
        torch.testing.assert_close(kernels[name], want.sum((2, 3)), rtol=1e-6, atol=1e-12)


# What is not here scores a kernel or a unit by itself, and is tested where it is defined.
@pytest.mark.parametrize("name", ["lamp", "wanda", "ria", "obd", "obd_sd", "obs"])
def test_kernels_and_units_score_the_sum_of_their_weights(name):
    net, data = make()
    single = score(net, data, importance=name, granularity="weight")
    kernels = score(net, data, importance=name, granularity="kernel")
    units = score(net, data, importance=name, granularity="neuron")
    torch.testing.assert_close(kernels["0"], single["0"].sum((2, 3)), rtol=1e-6, atol=1e-12)
    for layer in ("0", "3", "5"):
        want = single[layer].flatten(1).sum(1)
        torch.testing.assert_close(units[layer], want, rtol=1e-6, atol=1e-12)


def test_dropout_damage_is_the_mean_over_all_masks_of_a_net_that_does_not_add_up():
    net, data = make()
    importance = DropoutDamage(masks=512, wobble=0.0, cut=0.4, seed=1)
    score(net, data, importance=importance, layers="3")
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    with torch.no_grad():
        hidden = net[:5](x)
        every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6))).double()
        losses = torch.stack([F.cross_entropy(net[5](hidden * keep), y) for keep in every])
    kept = every.bool()
    want = torch.stack([losses[~kept[:, j]].mean() - losses[kept[:, j]].mean() for j in range(6)])
    got, error = importance.damage["3"], importance.standard_error["3"]
    assert (error > 0).all() and error.max() < 0.2 * (want.max() - want.min())
    assert ((got - want).abs() <= 4 * error).all()


def spoken_loop(weight, x, sparsity, width):
    """SparseGPT in the words of its paper, with a fresh inverse for every column; float64."""
    weight, k = weight.clone(), weight.shape[1]
    h = x.T @ x
    h += 0.01 * h.diagonal().mean() * torch.eye(k, dtype=h.dtype)
    keep = torch.ones_like(weight, dtype=torch.bool)
    remove = round(sparsity * weight.numel())
    for start in range(0, k, width):
        end = min(start + width, k)
        costs = [weight[:, q] ** 2 / torch.linalg.inv(h[q:, q:])[0, 0] for q in range(start, end)]
        gone = int((~keep).sum())
        drop = torch.stack(costs, 1).flatten().argsort()[: round(remove * end / k) - gone]
        for place in drop.tolist():
            row, column = divmod(place, end - start)
            keep[row, start + column] = False
        for q in range(start, end):
            inverse = torch.linalg.inv(h[q:, q:])
            for row in (~keep[:, q]).nonzero()[:, 0].tolist():
                weight[row, q:] -= weight[row, q].clone() / inverse[0, 0] * inverse[0]
                weight[row, q] = 0
    return keep, weight


@pytest.mark.parametrize("width", [1, 4, 128])
def test_sparsegpt_is_its_loop(width):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 7)).double()
    x = torch.randn(60, 10).double() @ torch.randn(10, 10).double()
    keep, weight = spoken_loop(net[0].weight.detach(), x, 0.5, width)
    prune_(net, [x[:40], x[40:]], importance=SparseGpt(width=width), sparsity=0.5)
    assert torch.equal(masks(net)["0.weight"], keep)
    torch.testing.assert_close(net[0].weight.detach(), weight, rtol=1e-6, atol=1e-9)


def test_every_importance_has_an_oracle():
    """A new importance needs a computation of another kind beside it: name the file it is in."""
    assert set(importances) == {
        "nnrelief",  # test_golden: the authors' masks; test_nnrelief, test_kernel_response: loops
        "magnitude",  # torch.nn.utils.prune, here and in test_criteria
        "random",  # the uniform distribution, here
        "lamp",  # test_criteria: the double loop
        "wanda",  # test_criteria: norms of inputs, responses of single weights
        "ria",  # the same
        "snip",  # test_criteria: finite differences by a gate
        "taylor",  # the same, here; batch by batch in test_criteria
        "obd",  # test_criteria: sample by sample; second differences; J^T H J
        "obd_sd",  # sample by sample, here and in test_criteria
        "obs",  # test_brain_surgeon: the error of the best fit; least squares
        "sparsegpt",  # the loop with inverses, here
        "apoz",  # test_units: counting
        "firing_rate",  # the same
        "dropout_damage",  # all masks, here; leave one out, in test_units
    }
