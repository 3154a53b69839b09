"""Neural burden against loops over samples, units and connections."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight.prune import burden, prune_
from liveweight.prune.burden import gini


def make():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6),
        nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    return net.eval(), [torch.randn(5, 2, 5, 5), torch.randn(3, 2, 5, 5)]


def loads(net, data):
    """Loop over samples and units: sum of |w x| and |b|, per output position of a convolution."""
    x = torch.cat(data)
    found = {}
    for name, module in net.named_children():
        if isinstance(module, nn.Linear):
            w = module.weight.detach().abs()
            each = [(w * row.abs()).sum(1) + module.bias.abs() for row in x]
            found[name] = torch.stack(each).mean(0).detach()
        elif isinstance(module, nn.Conv2d):
            y = F.conv2d(x.abs(), module.weight.abs(), module.bias.abs(), 2, 1)
            found[name] = y.mean((0, 2, 3)).detach()
        x = module(x)
    return found


def test_loads_burdens_and_errors_are_the_loops():
    dense, data = make()
    net = copy.deepcopy(dense)
    prune_(net, importance="magnitude", sparsity=0.6)
    report = burden(net, dense, data)
    mine, theirs = loads(net, data), loads(dense, data)
    rows = {row.name: row for row in report.layers}
    every = []
    for name in ("0", "3", "5"):
        kept = net.get_submodule(name).weight.ne(0).flatten(1).sum(1)
        full = net.get_submodule(name).weight[0].numel()
        alive = kept > 0
        ratios = ((mine[name] / kept) / (theirs[name] / full))[alive]
        every.append(ratios)
        row = rows[name]
        assert row.burden == pytest.approx(float(ratios.mean()), rel=1e-5)
        assert row.burden_p90 == pytest.approx(float(ratios.quantile(0.9)), rel=1e-5)
        assert row.load == pytest.approx(float(mine[name][alive].mean()), rel=1e-5)
        assert row.dead_units == int((~alive).sum())
        assert row.gini == pytest.approx(gini(mine[name][alive]), rel=1e-5)
    assert report.network.burden == pytest.approx(float(torch.cat(every).mean()), rel=1e-5)
    x = torch.cat(data)
    error = (net(x) - dense(x)).square().sum() / dense(x).square().sum()
    assert report.network.error == pytest.approx(float(error.detach()), rel=1e-5)
    change = (net[0](x) - dense[0](x)).square().sum() / dense[0](x).square().sum()
    assert rows["0"].error == pytest.approx(float(change.detach()), rel=1e-5)


def test_a_net_beside_itself_bears_what_it_bore():
    dense, data = make()
    report = burden(copy.deepcopy(dense), dense, data)
    for row in (*report.layers, report.network):
        assert row.burden == pytest.approx(1) and row.burden_p90 == pytest.approx(1)
        assert row.error == 0 and row.density == 1 and row.gini == row.dense_gini


def test_burden_doubles_where_half_the_inputs_carry_the_same_load():
    dense = nn.Sequential(nn.Linear(4, 2, bias=False))
    net = copy.deepcopy(dense)
    with torch.no_grad():
        dense[0].weight.fill_(1.0)
        net[0].weight.copy_(torch.tensor([[2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]]))
    report = burden(net, dense, [torch.ones(3, 4)])
    assert report.network.burden == pytest.approx(2.0)
    assert report.network.load == pytest.approx(report.network.dense_load)


def test_gini_of_known_distributions():
    assert gini(torch.ones(7)) == pytest.approx(0)
    assert gini(torch.tensor([0.0, 0.0, 0.0, 5.0])) == pytest.approx(0.75)
    values = torch.rand(30).double()
    pairs = (values[:, None] - values).abs().sum() / (2 * 30 * values.sum())
    assert gini(values) == pytest.approx(float(pairs))
    assert gini(torch.zeros(3)) == 0 and gini(torch.zeros(0)) == 0


def test_dead_units_and_layers_are_left_out():
    dense, data = make()
    net = copy.deepcopy(dense)
    with torch.no_grad():
        net[3].weight[2] = 0
        net[5].weight.zero_()
    report = burden(net, dense, data)
    rows = {row.name: row for row in report.layers}
    assert rows["3"].dead_units == 1 and rows["5"].dead_units == 3
    assert rows["5"].burden != rows["5"].burden  # nobody bears it
    assert report.network.dead_units == 4


def test_report_as_table_json_and_plot(tmp_path):
    dense, data = make()
    report = burden(copy.deepcopy(dense), dense, iter(data), steps=1, ignore="0")
    assert "network" in report.table() and "1.00x" in str(report)
    assert [r["name"] for r in json.loads(report.to_json())["layers"]] == ["3", "5"]
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "burden.png")
    assert (tmp_path / "burden.png").stat().st_size > 1000


def test_nets_that_do_not_match_are_refused_and_nothing_changes():
    dense, data = make()
    dense.train()
    with pytest.raises(ValueError, match="no Linear '3'"):
        burden(dense, nn.Sequential(*list(dense)[:3]), data)
    other = copy.deepcopy(dense)
    other[3] = nn.Linear(36, 7)
    with pytest.raises(ValueError, match=r"'3' is \[6, 36\] in the model and \[7, 36\]"):
        burden(dense, other, data)
    with pytest.raises(ValueError, match="data is empty"):
        burden(dense, copy.deepcopy(dense), [])
    with pytest.raises(TypeError, match="dense must be an nn.Module"):
        burden(dense, None, data)
    assert dense.training and not dense._forward_hooks
