from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from liveweight._graph import trace
from liveweight.runs.count import count_weights
from liveweight.runs.models import build_model


@pytest.mark.parametrize(("name", "weights"), [("lenet300", 266_610), ("lenet5", 431_080)])
def test_built_in_models_have_the_published_sizes(name, weights):
    model = build_model(name, seed=0)
    assert sum(p.numel() for p in model.parameters()) == weights
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "classes", "weights"),
    [
        ("vgg-like", 10, 14_982_474),
        ("vgg13", 10, 9_935_434),
        ("vgg16", 10, 15_245_130),
        ("vgg16", 100, 15_291_300),
        ("resnet20", 10, 267_914 + 432),  # the published counts leave out the stem's 432
        ("resnet20", 100, 273_764 + 432),
        ("resnet56", 10, 848_522 + 432),
        ("resnet56", 100, 854_372 + 432),
    ],
)
def test_nets_for_cifar_have_the_published_sizes(name, classes, weights):
    with torch.device("meta"):
        model = build_model(name, {"classes": classes})
    counts = count_weights(model)
    assert counts["total"] == weights
    norms = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert counts["total_all"] == weights + 2 * norms
    assert model(torch.rand(2, 3, 32, 32, device="meta")).shape == (2, classes)


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 9), ("resnet56", 27)])
def test_residual_blocks_are_found_with_shortcuts_that_can_be_masked(name, blocks):
    found = trace(build_model(name)).residual_blocks
    assert len(found) == blocks
    kinds = [block.shortcut_kind for block in found]
    assert kinds.count("pad") == 2 and kinds.count("identity") == blocks - 2
    assert all(block.shortcut and block.closed and block.whole for block in found)
    assert [b.pad_before for b in found if b.shortcut_kind == "pad"] == [8, 16]


def test_first_weights_are_kaiming_normal_and_biases_zero():
    layer = build_model("lenet5", seed=0).classifier[1]
    expected = math.sqrt(2 / layer.in_features)
    assert layer.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert layer.bias.eq(0).all()


def test_a_seed_gives_the_same_weights():
    first, second = (build_model("lenet300", seed=4).state_dict() for _ in range(2))
    other = build_model("lenet300", seed=5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["classifier.1.weight"], other["classifier.1.weight"])


def test_arguments_reach_the_factory():
    model = build_model("lenet5", {"channels": 3, "size": 32, "classes": 7})
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 7)
    model = build_model("torch.nn:Linear", {"in_features": 3, "out_features": 2})
    assert isinstance(model, nn.Linear)
    assert isinstance(build_model("torch.nn.Identity"), nn.Identity)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lenet", {}, "not built in.*'lenet5'"),
        ("no_such_package:Net", {}, "cannot import 'no_such_package'"),
        ("torch.nn:Linaer", {}, "no callable 'Linaer'.*'Linear'"),
        ("lenet5", {"clases": 3}, "clases"),
        ("lenet5", {"size": 9}, "size must be at least 16, got 9"),
    ],
)
def test_models_that_cannot_be_built(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, arguments)


def test_a_factory_that_gives_no_module():
    with pytest.raises(TypeError, match="gave a int, expected an nn.Module"):
        build_model("builtins:int")


def test_the_net_for_speech_hears_pictures_of_sound():
    model = build_model("speech-cnn", {"classes": 5}, seed=0)
    assert model(torch.rand(2, 1, 32, 64)).shape == (2, 5)
    assert build_model("speech-cnn", {"bands": 16, "frames": 24})(torch.rand(2, 1, 16, 24)).shape
    with pytest.raises(ValueError, match=">= 8, got 7 x 64"):
        build_model("speech-cnn", {"bands": 7})
    assert set(trace(model).layers) >= {"features.0", "classifier.1", "classifier.4"}
    assert sum(p.numel() for p in build_model("speech-cnn").parameters()) == 154_890
