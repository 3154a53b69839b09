"""Whole units: firing rates, dropout damage, and what goes when a unit goes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liveweight as lw
from liveweight.prune import Apoz, DropoutDamage, FiringRate, prune_, score
from liveweight.prune.dropout_damage import fit_damage

DATA = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_rates_count_samples_and_positions(nets):
    net = nets.ConvNet().eval()
    x = torch.cat(DATA)
    a = F.relu(net.bn1(net.conv1(x)))
    b = F.relu(net.conv2(F.max_pool2d(a, 2)))
    c = F.relu(net.fc1(b.flatten(1)))
    for name in ("firing_rate", "apoz"):
        found = score(net, DATA, importance=name, layers=["conv1", "conv2", "fc1"])
        assert found.granularity["conv1"] == "neuron"
        for layer, h in (("conv1", a), ("conv2", b), ("fc1", c)):
            dims = [d for d in range(h.dim()) if d != 1]
            torch.testing.assert_close(found[layer], (h > 0).float().mean(dims))


def test_units_that_are_never_exactly_zero_need_a_threshold():
    net = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 2))
    x = [torch.randn(200, 5)]
    with pytest.raises(ValueError, match="apoz.*'0' is followed by gelu"):
        score(net, x, importance="apoz", layers="0")
    h = F.gelu(net[0](x[0])).detach().abs()
    got = score(net, x, importance=Apoz(eps=0.05), layers="0")["0"]
    torch.testing.assert_close(got, (h > 0.05).float().mean(0))
    got = score(net, x, importance=FiringRate(quantile=0.25), layers="0")["0"]
    torch.testing.assert_close(got, (h > h.flatten().quantile(0.25)).float().mean(0))


def test_numbers_out_of_range_are_refused():
    for make, words in (
        (lambda: FiringRate(eps=-1), "eps"),
        (lambda: FiringRate(quantile=2), "quantile"),
        (lambda: DropoutDamage(keep=1.0), "keep"),
        (lambda: DropoutDamage(masks=3), "masks"),
        (lambda: DropoutDamage(wobble=1.0), "wobble"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


class Additive(nn.Module):
    """The mean of the output is the sum of what the hidden units add: leave-one-out is exact."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 1, bias=False)

    def forward(self, x):
        return self.out(F.relu(self.hidden(x)))


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_dropout_damage_is_leave_one_out_where_units_add_up(keep):
    torch.manual_seed(1)
    net = Additive()
    data = [(torch.randn(30, 4), torch.zeros(30)), (torch.randn(10, 4), torch.zeros(10))]

    def loss(output, labels):
        return output.mean()

    importance = DropoutDamage(keep, masks=128, wobble=0.0, loss=loss, cut=0.4)
    shifted = score(net, data, importance=importance, layers="hidden")["hidden"]
    x = torch.cat([x for x, _ in data])
    adds = (F.relu(net.hidden(x)) * net.out.weight[0]).mean(0).detach()
    torch.testing.assert_close(importance.damage["hidden"].float(), -adds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shifted, (-adds) - (-adds).min(), rtol=1e-4, atol=1e-5)
    assert float(importance.standard_error["hidden"].max()) < 1e-5
    assert importance.drawn["hidden"] <= 128


def test_the_standard_error_covers_the_damage():
    generator = torch.Generator().manual_seed(0)
    true = torch.linspace(-1, 2, 12, dtype=torch.float64)
    for masks in (24, 400):  # difference of means, and least squares
        inside = 0
        for _ in range(60):
            draw = torch.rand(masks // 2, 12, generator=generator)
            kept = torch.stack([draw < 0.5, draw >= 0.5], 1).flatten(0, 1)
            noise = 0.3 * torch.randn(masks, generator=generator).double()
            damage, error = fit_damage(kept, (~kept).double() @ true + noise)
            inside += int(((damage - true).abs() <= 3 * error).sum())
        assert inside >= 0.95 * 60 * 12


def test_damage_repeats_under_a_seed_and_stops_when_the_cut_is_stable(nets):
    net = nets.Mlp(6, 16, 3)
    data = [(torch.randn(40, 6), torch.randint(0, 3, (40,)))]
    one, two = DropoutDamage(seed=3, wobble=0.3), DropoutDamage(seed=3, wobble=0.3)
    for importance in (one, two):
        score(net, data, importance=importance, layers="0")
    assert torch.equal(one.damage["0"], two.damage["0"])
    assert one.drawn["0"] == two.drawn["0"] <= 512


def test_removed_units_take_bias_and_norm_along_and_shrink_follows(nets):
    net = nets.ConvNet().eval()
    nn.init.uniform_(net.bn1.bias, 0.5, 1.0)
    report = prune_(net, DATA, importance="magnitude", granularity="neuron", sparsity=0.5)
    rows = {row.name: row for row in report.layers}
    assert "model's output" in rows["fc2"].note and rows["fc2"].kept == rows["fc2"].total
    gone = net.conv1.weight.flatten(1).eq(0).all(1)
    assert gone.sum() == 3
    assert net.conv1.bias[gone].eq(0).all() and net.bn1.bias[gone].eq(0).all()
    want = net(DATA[0])
    lw.strip_(net)
    lw.shrink_(net, DATA[0])
    assert net.conv1.out_channels == 3 and net.fc1.out_features == rows["fc1"].kept // 20
    torch.testing.assert_close(net(DATA[0]), want)


def test_units_compare_by_what_they_carry_not_by_shares_of_their_own_total(nets):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    with torch.no_grad():
        net[0].weight[1::2] *= 100
    data = [torch.randn(32, 4)]
    found = score(net, data, importance="nnrelief", granularity="neuron")
    carried = (net[0].weight.detach().abs() * data[0].abs().mean(0)).sum(1)
    torch.testing.assert_close(found["0"], carried)
    report = prune_(net, data, importance="nnrelief", granularity="neuron", sparsity=0.5)
    assert net[0].weight.ne(0).any(1).tolist() == [False, True] * 3
    assert report.layers[0].kept_mass == pytest.approx(float(carried[1::2].sum() / carried.sum()))


def test_mass_keeps_the_fewest_units_of_a_layer(nets):
    net = nets.ConvNet().eval()
    scores = score(net, importance="magnitude", granularity="neuron")
    prune_(net, importance="magnitude", granularity="neuron", alpha=0.7)
    for name in ("conv1", "conv2", "fc1"):
        kept = net.get_submodule(name).weight.flatten(1).ne(0).any(1)
        ranked = scores[name].sort(descending=True).values.cumsum(0)
        assert int(kept.sum()) == int((ranked < 0.7 * ranked[-1]).sum()) + 1
        assert scores[name][kept].min() >= scores[name][~kept].max()


def test_a_model_that_cannot_be_traced_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="which units are the model's output"):
        prune_(Odd(), importance="magnitude", granularity="neuron", sparsity=0.5)
