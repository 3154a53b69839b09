"""Merging units: exact where one is a multiple of another, better than cutting elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight.prune import masks, merge_, prune_

DATA = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def proportional(layer, source, target, scale):
    """Make unit `source` scale times unit `target`."""
    with torch.no_grad():
        layer.weight[source] = scale * layer.weight[target]
        if layer.bias is not None:
            layer.bias[source] = scale * layer.bias[target]


@pytest.mark.parametrize("similarity", ["weights", "activations"])
def test_proportional_units_merge_without_any_change(nets, similarity):
    net = nets.ConvNet().double().eval()
    data = [x.double() for x in DATA]
    with torch.no_grad():  # a BatchNorm that does nothing leaves units proportional
        net.bn1.weight.copy_((net.bn1.running_var + net.bn1.eps).sqrt())
        net.conv1.weight *= 3
    for layer in (net.conv1, net.conv2, net.fc1):
        proportional(layer, 1, 3, 0.2)
    want = net(data[0])
    options = {"importance": "magnitude", "sparsity": 0.14}
    cut = nets.ConvNet().double().eval()
    cut.load_state_dict(net.state_dict())
    prune_(cut, granularity="neuron", **options)
    report = merge_(net, data, similarity=similarity, **options)
    assert masks(net).keys() == masks(cut).keys()
    assert all(torch.equal(masks(net)[n], m) for n, m in masks(cut).items())
    gone = [net.get_submodule(n).weight.flatten(1).eq(0).all(1) for n in ("conv1", "conv2", "fc1")]
    assert [g.nonzero().flatten().tolist() for g in gone] == [[1], [1], [1]]
    torch.testing.assert_close(net(data[0]), want, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(cut(data[0]), want, rtol=1e-3)
    assert "3 of 3 removed units found a stand-in" in report.notes[-1]


def test_a_batch_norm_with_its_own_scale_per_unit_is_folded_in(nets):
    net = nets.ConvNet().double().eval()
    nn.init.uniform_(net.bn1.weight, 0.5, 2.0)
    nn.init.uniform_(net.bn1.running_var, 0.5, 2.0)
    nn.init.uniform_(net.bn1.running_mean, -1, 1)
    with torch.no_grad():  # unit 4 after the norm is 0.3 times unit 2 after the norm
        sigma = (net.bn1.running_var + net.bn1.eps).sqrt()
        net.conv1.weight[4] = 0.01 * net.conv1.weight[2]
        net.bn1.weight[4] = 0.3 * net.bn1.weight[2] / sigma[2] * sigma[4] / 0.01
        offset = net.bn1.weight / sigma * (net.conv1.bias - net.bn1.running_mean)
        net.bn1.bias[4] = 0.3 * (net.bn1.bias[2] + offset[2]) - offset[4]
    want = net(DATA[0].double())
    merge_(net, importance="magnitude", sparsity=0.15, layers="conv1")
    assert net.conv1.weight[4].eq(0).all()
    torch.testing.assert_close(net(DATA[0].double()), want, rtol=1e-9, atol=1e-9)


def test_merging_similar_units_changes_less_than_cutting_them():
    torch.manual_seed(0)
    better = 0
    for seed in range(10):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 5))
        with torch.no_grad():
            net[0].weight[16:] = 0.5 * net[0].weight[:16] + 0.05 * torch.randn(16, 10)
            net[0].bias[16:] = 0.5 * net[0].bias[:16]
        x = torch.randn(200, 10)
        want, cut = net(x), nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 5))
        cut.load_state_dict(net.state_dict())
        prune_(cut, importance="magnitude", granularity="neuron", sparsity=0.5)
        merge_(net, [x], similarity="activations", importance="magnitude", sparsity=0.5)
        better += int(F.mse_loss(net(x), want) < 0.5 * F.mse_loss(cut(x), want))
    assert better >= 9


def test_what_cannot_be_merged_is_cut_and_named():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(16, 3)
    )
    report = merge_(net, importance="magnitude", sparsity=0.25)
    assert any("'0' was cut, not merged: '2' is a grouped" in note for note in report.notes)
    with pytest.raises(ValueError, match="'weights', 'activations'"):
        merge_(net, importance="magnitude", sparsity=0.25, similarity="weight")
    with pytest.raises(ValueError, match="needs data"):
        merge_(net, importance="magnitude", sparsity=0.25, similarity="activations")
    with pytest.raises(ValueError, match="least"):
        merge_(net, importance="magnitude", sparsity=0.25, least=2)
    with pytest.raises(ValueError, match="no granularity"):
        merge_(net, importance="magnitude", sparsity=0.25, granularity="weight")


def test_unlike_units_are_left_without_a_stand_in():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4) * torch.tensor([1.0, 2.0, 3.0, 4.0]))
    after = net[2].weight.detach().clone()
    report = merge_(net, importance="magnitude", sparsity=0.5)
    assert torch.equal(net[2].weight, after)
    assert "0 of 2" in report.notes[-1]
