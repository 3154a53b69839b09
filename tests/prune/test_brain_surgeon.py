"""OBS and SparseGPT: saliencies by brute force, refits by least squares, exact counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight.prune import Obs, SparseGpt, masks, prune_, score


def make(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(54, 7), nn.ReLU(), nn.Linear(7, 5),
    ).double()  # fmt: skip
    mix = torch.randn(4, 4).double()
    x = torch.einsum("nchw,cd->ndhw", torch.randn(60, 4, 5, 5).double(), mix)
    return net.eval(), [x[:40], x[40:]]


def inputs(net, name, data):
    x = torch.cat(data)
    for key, module in net.named_children():
        if key == name:
            return x.detach()
        x = module(x)


def error(net, name, weight, data):
    """Mean over samples of the squared change of a layer's output."""
    x, layer = inputs(net, name, data), net.get_submodule(name)
    change = layer.weight.detach() - weight
    if isinstance(layer, nn.Linear):
        return float(F.linear(x, change).square().sum(1).mean())
    out = F.conv2d(x, change, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return float(out.square().sum((1, 2, 3)).mean())


def refitted(net, data, importance, **options):
    """Return the layers' weights after prune_, and leave the net as it was."""
    state = {k: v.clone() for k, v in net.state_dict().items()}
    report = prune_(net, data, importance=importance, **options)
    found = {n: net.get_submodule(n).weight.detach().clone() for n in ("0", "3", "5")}
    kept = {n: m.clone() for n, m in masks(net).items()}
    fresh, _ = make()
    fresh.load_state_dict(state)
    return fresh, found, kept, report


def test_the_saliency_is_the_error_of_the_best_fit_without_the_weight():
    net, data = make()
    tiny = Obs(damp=1e-9)
    found = score(net, data, importance=tiny)
    for name, row, column in [("5", 2, 3), ("3", 1, 10), ("0", 4, 7)]:
        layer = net.get_submodule(name)
        keep = torch.ones_like(layer.weight, dtype=torch.bool)
        keep.view(keep.shape[0], -1)[row, column] = False
        seen = tiny.observer(_target(name, layer))
        for x in data:
            seen.update(_to(net, name, x))
        weight = tiny.refit(_target(name, layer), seen, keep)
        got = float(found[name].flatten(1)[row, column])
        assert got == pytest.approx(error(net, name, weight, data), rel=1e-4, abs=1e-9)


def _target(name, layer):
    from liveweight.prune import Target

    kind = "linear" if isinstance(layer, nn.Linear) else "conv"
    return Target(name, layer, kind, "weight")


def _to(net, name, x):
    return inputs(net, name, [x])


def test_the_refit_is_least_squares_on_what_is_kept():
    net, data = make()
    before, found, kept, _ = refitted(net, data, Obs(damp=1e-10), sparsity=0.5)
    x = inputs(before, "5", data)
    w, keep = before[5].weight.detach(), kept["5.weight"]
    for row in range(5):
        columns = keep[row].nonzero()[:, 0]
        best = torch.linalg.lstsq(x[:, columns], x @ w[row]).solution
        torch.testing.assert_close(found["5"][row, columns], best, rtol=1e-4, atol=1e-6)
    for name in ("0", "3", "5"):
        masked = before.get_submodule(name).weight.detach() * kept[f"{name}.weight"]
        assert error(before, name, found[name], data) < error(before, name, masked, data)
        assert found[name][~kept[f"{name}.weight"]].eq(0).all()


@pytest.mark.parametrize("importance", [Obs(), SparseGpt(), SparseGpt(width=8)])
def test_refitting_beats_masking_at_the_same_sparsity(importance):
    net, data = make()
    _, _, plain, _ = refitted(net, data, "wanda", sparsity=0.6)
    net, data = make()
    before, found, kept, report = refitted(net, data, importance, sparsity=0.6)
    for name in ("0", "3", "5"):
        dense = before.get_submodule(name).weight.detach()
        own = error(before, name, dense * kept[f"{name}.weight"], data)
        assert error(before, name, found[name], data) < own
    dense = before[3].weight.detach()
    bare = error(before, "3", dense * plain["3.weight"], data)
    assert error(before, "3", found["3"], data) < 0.7 * bare
    for row in report.layers:
        assert row.kept == round(0.4 * row.total)


def test_sparsegpt_without_correlation_is_a_cut_by_magnitude():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16, bias=False))
    x = torch.linalg.qr(torch.randn(64, 8).double()).Q.float()  # H is a multiple of I
    dense = net[0].weight.detach().clone()
    prune_(net, [x], importance=SparseGpt(width=8), sparsity=0.5)
    order = dense.abs().flatten().argsort()[:64]
    assert net[0].weight.flatten()[order].eq(0).all()
    keep = net[0].weight != 0
    torch.testing.assert_close(net[0].weight[keep], dense[keep], rtol=1e-4, atol=1e-5)


def test_two_of_four_refits_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 8))
    x = [torch.randn(100, 32) @ torch.randn(32, 32)]
    dense = net[0].weight.detach().clone()
    prune_(net, x, importance="sparsegpt", granularity="vnm", pattern=(1, 2, 4))
    assert (net[0].weight != 0).unflatten(1, (-1, 4)).sum(2).eq(2).all()
    best = dense * masks(net)["0.weight"]
    change = lambda w: float((x[0] @ (dense - w).t()).square().sum())  # noqa: E731
    assert change(net[0].weight.detach()) < change(best)


@pytest.mark.parametrize("name", ["obs", "sparsegpt"])
def test_calls_add_up_and_inputs_that_never_come_are_survived(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 6))
    x = torch.randn(50, 12)
    x[:, 3] = 0  # nothing comes through it
    prune_(net, [x], importance=name, sparsity=0.3)
    first = masks(net)["0.weight"].clone()
    prune_(net, [x], importance=name, sparsity=0.6)
    second = masks(net)["0.weight"]
    assert not (second & ~first).any() and int(second.sum()) == round(0.4 * 72)
    assert torch.isfinite(net[0].weight).all() and net[0].weight[~second].eq(0).all()


def test_a_dry_run_and_a_failure_change_nothing():
    net, data = make()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    prune_(net, data, importance="obs", sparsity=0.5, dry_run=True)
    for options, words in (
        ({"alpha": 0.9}, "sparsity per layer"),
        ({"sparsity": 0.5, "scope": "global"}, "sparsity per layer"),
        ({"sparsity": 0.5, "granularity": "kernel"}, "single weights"),
        ({"sparsity": 0.5, "granularity": "block", "block": (2, 2)}, "makes no block"),
        ({"granularity": "vnm", "pattern": (4, 2, 4), "layers": "3"}, None),
    ):
        with pytest.raises(ValueError, match=words):
            prune_(net, data, importance="sparsegpt", **options)
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[k], v) for k, v in after.items())
    for bad in (lambda: Obs(damp=0), lambda: SparseGpt(width=0)):
        with pytest.raises(ValueError, match="must be"):
            bad()
