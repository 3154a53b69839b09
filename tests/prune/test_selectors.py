from __future__ import annotations

import pytest
import torch
from torch import nn

from liveweight.prune import prune_
from liveweight.prune.selectors import choose_layers


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
        self.up = nn.ConvTranspose2d(2, 2, 3)
        self.words = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm((4, 4))
        self.head = nn.Linear(4, 2)
        self.tied = nn.Linear(4, 5)
        self.tied.weight = self.words.weight
        self.empty = nn.Linear(1, 3)
        self.empty.weight = nn.Parameter(torch.empty(3, 0))
        self.lazy = nn.LazyLinear(3)


ALL = {"features.0", "features.2", "head"}


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (None, ALL),
        ("features.0", {"features.0"}),
        ("features", {"features.0", "features.2"}),
        (["features.*", "head"], ALL),
        ("re:.*(ead|0)", {"head", "features.0"}),
        (nn.Linear, {"head"}),
        ([nn.Conv2d], {"features.0", "features.2"}),
    ],
)
def test_layers_and_ignore(layers, found):
    model = Model()
    chosen, left, _ = choose_layers(model, layers)
    assert set(chosen) == found
    if layers is not None:
        rest, ignored, _ = choose_layers(model, ignore=layers)
        assert set(rest) == ALL - found
        assert all(ignored[n] == "ignored" for n in found)


def test_what_cannot_be_pruned_is_left_alone_and_named():
    chosen, left, notes = choose_layers(Model())
    assert left["tied"] == "it shares its weight with 'words'"
    assert "no inputs" in left["empty"] and "no shape" in left["lazy"]
    assert any("'up' (ConvTranspose2d) is not supported" in n for n in notes)
    assert any("'words' (Embedding)" in n for n in notes)
    assert not any("norm" in n for n in notes)


@pytest.mark.parametrize("argument", ["layers", "ignore"])
@pytest.mark.parametrize(
    ("selector", "hint"),
    [
        ("feature.0", "'features.0'"),
        ("haed", "did you mean 'head'"),
        ("re:haed", "did you mean 'head'"),
        ("encoder.*", "did you mean"),
        (nn.Conv1d, "did you mean 'Conv2d'"),
    ],
)
def test_a_selector_that_matches_nothing_lists_near_misses(argument, selector, hint):
    with pytest.raises(ValueError, match=f"{argument}: selector .* matches nothing; .*{hint}"):
        choose_layers(Model(), **{argument: selector})


def test_layers_that_cannot_be_pruned_at_all():
    with pytest.raises(ValueError, match="selects only ConvTranspose2d"):
        choose_layers(Model(), "up")


def test_bad_selectors():
    with pytest.raises(TypeError, match="a selector is a name.*got int"):
        choose_layers(Model(), [3])
    with pytest.raises(ValueError, match="no regular expression"):
        choose_layers(Model(), "re:(")


def test_a_parametrized_weight_is_left_alone():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    chosen, left, _ = choose_layers(model)
    assert set(chosen) == {"1"} and "parametrization" in left["0"]


def test_nothing_left_to_prune_says_why():
    model = nn.Sequential(nn.Linear(1, 3))
    model[0].weight = nn.Parameter(torch.empty(3, 0))
    with pytest.raises(ValueError, match="no layer to work on: '0': it has no inputs"):
        prune_(model, importance="magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match="no nn.Linear and no nn.Conv2d"):
        prune_(nn.ReLU(), importance="magnitude", sparsity=0.5)
