"""Rounding weights: the grid, the best scale, bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from liveweight.prune import quantize_weights_
from liveweight.prune.quantize import round_rows


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_unit_has_its_grid_and_about_the_best_scale(bits):
    torch.manual_seed(0)
    rows = torch.randn(5, 200).double()
    rows[3, :50] = 0
    got = round_rows(rows, bits)
    most = 2 ** (bits - 1) - 1
    assert got[3, :50].eq(0).all()
    for row, found in zip(rows, got, strict=True):
        assert len(found.unique()) <= 2**bits - 1
        steps = row.abs().max() * torch.arange(1, 81) / 80 / most
        places = found / steps[:, None]
        assert ((places - places.round()).abs().amax(1) < 1e-9).any()
        fine = torch.linspace(0.02, 1.2, 3000).double() * row.abs().max() / most
        tried = (row / fine[:, None]).clamp(-most, most).round() * fine[:, None]
        best = (row - tried).square().sum(1).min()
        assert (row - found).square().sum() <= 1.25 * best


def test_layers_report_bytes_and_error_and_biases_stay():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 7))
    biases = [net[0].bias.clone(), net[3].bias.clone()]
    before = net[0].weight.detach().clone()
    rows = quantize_weights_(net, 4)
    assert [(r.name, r.bits, r.weights) for r in rows] == [("0", 4, 135), ("3", 4, 140)]
    assert [r.bytes for r in rows] == [68 + 10, 70 + 14]
    error = float((net[0].weight - before).detach().norm() / before.norm())
    assert rows[0].error == pytest.approx(error, rel=1e-5) and 0.02 < error < 0.2
    assert torch.equal(net[0].bias, biases[0]) and torch.equal(net[3].bias, biases[1])
    errors = []
    for bits in (8, 6, 4, 3, 2):
        fresh = nn.Linear(50, 10)
        torch.manual_seed(1)
        nn.init.normal_(fresh.weight)
        errors.append(quantize_weights_(nn.Sequential(fresh), bits)[0].error)
    assert errors == sorted(errors)


def test_zeros_stay_and_an_empty_layer_is_no_trouble():
    net = nn.Sequential(nn.Linear(8, 4))
    nn.init.zeros_(net[0].weight)
    assert quantize_weights_(net, 2)[0].error == 0 and net[0].weight.eq(0).all()


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "4"])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="from 2 to 8"):
        quantize_weights_(nn.Sequential(nn.Linear(2, 2)), bits)
