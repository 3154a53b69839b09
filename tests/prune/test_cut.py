from __future__ import annotations

import pytest
import torch
from torch import nn

from liveweight.prune import apply_masks_, prune_
from liveweight.prune.cut import cut_layers


def halves(rows, columns, keep_rows, keep_columns):
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[keep_rows, keep_columns] = True
    return mask


TOP, BOTTOM, ALL = slice(0, 4), slice(4, 8), slice(None)


@pytest.mark.parametrize(("columns", "cut"), [(TOP, []), (BOTTOM, ["2", "4"])])
def test_a_layer_that_reads_what_is_gone_is_found(columns, cut):
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)
    )  # fmt: skip
    apply_masks_(
        model, {"0.weight": halves(8, 6, TOP, ALL), "2.weight": halves(5, 8, ALL, columns)}
    )
    assert cut_layers(model) == cut
    x = torch.randn(4, 6)
    assert torch.allclose(model(x), model(-x)) is bool(cut)


def test_channels_that_a_flatten_spreads_are_followed():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(32, 3))
    kept = torch.zeros(8, 1, 3, 3, dtype=torch.bool)
    kept[:4] = True
    for columns, cut in ((slice(0, 16), []), (slice(16, 32), ["2"])):
        apply_masks_(model, {"0.weight": kept, "2.weight": halves(3, 32, ALL, columns)})
        assert cut_layers(model) == cut


def test_a_shortcut_keeps_the_way_open(nets):
    model = nets.ResNet()
    apply_masks_(model, {"block1.conv1.weight": torch.zeros(4, 4, 3, 3, dtype=torch.bool)})
    assert cut_layers(model) == ["block1.conv1", "block1.conv2"]  # the stem still goes on


def test_an_untraceable_model_says_nothing(nets):
    class Branching(nets.Mlp):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    assert cut_layers(Branching(4, 4, 2)) == []


def test_prune_says_where_blocks_cut_a_model_through():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[:4] += 9.0
        model[2].weight[:, 4:] += 9.0
    how = {"importance": "magnitude", "granularity": "block", "block": (4, 4), "ignore": "4"}
    report = prune_(model, sparsity=0.75, dry_run=True, **how)
    assert any(n.startswith("nothing of the input reaches '2' any more") for n in report.notes)
    assert not any("reaches" in n for n in prune_(model, sparsity=0.25, **how).notes)
