"""Checkpoints of shrunken and compressed models: the same modules, the same bits."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from liveweight.compress import compress_, load, save, shrink_
from liveweight.compress.container import read
from liveweight.compress.swap import make_sparse
from liveweight.nn import SparseLinear


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


@pytest.fixture
def fast(nets):
    """A shrunken and compressed LeNet and an input."""
    model = nets.sparsify(nets.settle(nets.LeNet()), 0.2)
    with torch.no_grad():
        model.features[3].weight[:, 2] = 0.0
        model.classifier[3].weight[:, 5:9] = 0.0
    x = torch.randn(2, 1, 16, 16)
    assert shrink_(model, x).removed >= 5
    compress_(model, x, measure=nets.Clock(**nets.ALL_FASTER))
    return model, x


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def test_structure_and_bits_come_back(nets, path, fast):
    model, x = fast
    save(model, path)
    fresh = load(path, nets.LeNet()).eval()
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]
    assert same_bits(model, fresh)
    assert torch.equal(model(x), fresh(x))
    conv = fresh.features[0]
    assert conv.parts == ("features.0", "features.1", "features.2")
    assert (conv.activation, conv.pool) == ("relu", 2) and conv.out_channels < 8
    save(fresh, path)
    assert same_bits(model, load(path, nets.LeNet()))


FRESH_PROCESS = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("compress_nets", sys.argv[1])
nets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nets)
import liveweight.compress as compress
model = compress.load(sys.argv[2], nets.LeNet()).eval()
data = torch.load(sys.argv[3], weights_only=True)
torch.set_num_threads(data["threads"])
assert torch.equal(model(data["x"]), data["y"]), "outputs differ"
"""


def test_fresh_process_gives_equal_bits(nets, path, fast, tmp_path):
    model, x = fast
    save(model, path)
    data = tmp_path / "data.pt"
    torch.save({"x": x, "y": model(x), "threads": torch.get_num_threads()}, data)
    command = [sys.executable, "-c", FRESH_PROCESS, nets.__file__, str(path), str(data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_size_is_density_plus_one_bit_per_weight(nets, path, density):
    model = nets.sparsify(nets.LeNet(width=32), density)
    dense_bytes = 4 * nets.size(model)
    kept = sum(int((p != 0).sum()) for p in model.parameters())
    compress_(model, torch.randn(1, 1, 16, 16), measure=nets.Clock(**nets.ALL_FASTER))
    save(model, path)
    limit = dense_bytes * (kept / (dense_bytes / 4) + 1 / 32) + 16_000
    assert path.stat().st_size <= limit


def test_kept_zeros_stay_in_the_pattern(nets, path, fast):
    model, x = fast
    with torch.no_grad():
        model.features[0].values[1] = 0.0  # a whole kept kernel
        model.features[3].values[0, 0, 0] = 0.0
        model.classifier[1].values[3] = 0.0
    save(model, path)
    fresh = load(path, nets.LeNet()).eval()
    assert same_bits(model, fresh)
    assert torch.equal(model(x), fresh(x))


def test_half_of_the_layers_dense_with_masks(nets, path):
    model = nets.sparsify(nets.settle(nets.LeNet()), 0.2)
    x = torch.randn(2, 1, 16, 16)
    compress_(model, x, measure=nets.Clock(unstructured=2.0))
    assert type(model.features[0]) is nn.Conv2d
    save(model, path)
    fresh = load(path, nets.LeNet()).eval()
    assert same_bits(model, fresh) and fresh.features[0].weight_mask.dtype == torch.bool
    assert torch.equal(model(x), fresh(x))


class Wrapper(nn.Module):
    def __init__(self, net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def test_compressed_model_inside_a_larger_one(nets, path, fast):
    model, x = fast
    save(Wrapper(model), path)
    fresh = load(path, Wrapper(nets.LeNet())).eval()
    assert torch.equal(model(x), fresh(x))
    assert fresh.net.features[0].parts == ("net.features.0", "net.features.1", "net.features.2")
    assert isinstance(fresh.net.features[1], nn.Identity)


def test_layers_without_bias_and_with_padding(nets, path):
    def build():
        conv = nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), groups=2, bias=False)
        return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 5, 3, bias=False))

    model = nets.sparsify(build(), 0.3)
    x = torch.randn(2, 4, 8, 8)
    compress_(model, x, measure=nets.Clock(**nets.ALL_FASTER))
    save(model, path)
    fresh = load(path, build())
    assert fresh[0].bias is None and fresh[0].groups == 2
    assert torch.equal(model(x), fresh(x))
    other = build()
    other[0].stride = (1, 1)
    with pytest.raises(ValueError, match=r"0 has stride \[1, 1\], expected \[2, 2\]"):
        load(path, other)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(nets, path, padding):
    def build():
        return nn.Sequential(nn.Conv2d(2, 4, (3, 5), padding=padding, dilation=(2, 1)))

    model = nets.sparsify(build(), 0.4)
    x = torch.randn(2, 2, 9, 9)
    compress_(model, x, measure=nets.Clock(**nets.ALL_FASTER))
    save(model, path)
    assert torch.equal(model(x), load(path, build())(x))


def test_frozen_and_half_precision_layers(nets, path):
    model = nets.sparsify(nets.LeNet(), 0.2)
    x = torch.randn(2, 1, 16, 16)
    compress_(model, x, measure=nets.Clock(**nets.ALL_FASTER))
    model.to(torch.bfloat16)
    save(model, path)
    fresh = nets.LeNet()
    fresh.requires_grad_(False)
    load(path, fresh)
    assert same_bits(model, fresh)
    assert not any(p.requires_grad for p in fresh.parameters())


def test_only_a_dense_instance_is_filled(nets, path, fast):
    model, _ = fast
    save(model, path)
    with pytest.raises(ValueError, match="is a SparseConv2d.*load wants a dense instance"):
        load(path, copy.deepcopy(model))


def test_other_neighbours_are_refused_and_nothing_changes(nets, path, fast):
    model, _ = fast
    save(model, path)
    fresh = nets.LeNet()
    fresh.features[1] = nn.Tanh()
    modules = list(fresh.modules())
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with pytest.raises(ValueError, match=r"features\.1 is a Tanh, expected a ReLU"):
        load(path, fresh)
    assert list(fresh.modules()) == modules
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


def test_failure_while_rebuilding_restores_the_model(nets, path, fast, monkeypatch):
    model, _ = fast
    save(model, path)
    fresh = nets.LeNet()
    modules = list(fresh.modules())
    before = {k: v.clone() for k, v in fresh.state_dict().items()}

    def broken(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr("liveweight.compress.rebuild.swap.make_sparse", broken)
    with pytest.raises(MemoryError):
        load(path, fresh)
    assert list(fresh.modules()) == modules
    assert fresh.features[0].out_channels == 8
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


def test_manifest_says_what_was_done(path, fast):
    model, _ = fast
    save(model, path)
    manifest, _ = read(path)
    entry = manifest["modules"]["features.0"]
    assert entry["type"] == "SparseConv2d" and entry["format"] == "kernelwise"
    assert entry["sizes"] == {"in_channels": 1, "out_channels": model.features[0].out_channels}
    assert entry["from"] == {"in_channels": 1, "out_channels": 8, "bias": True}
    assert entry["parts"] == ["features.1", "features.2"] and entry["pool"] == 2
    assert manifest["modules"]["features.1"] == {"type": "Identity", "was": "ReLU"}


def test_blocks_of_a_convolution_come_back(path):
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(32, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 8, 1))

    model = net().eval()
    with torch.no_grad():
        model[0].weight[:16, :16] = 0.0
        model[0].weight[16:32, 16:] = 0.0
        model[0].weight[0, 20, 1] = 0.0  # a zero inside a kept block
    options = {"activation": "relu", "block": (16, 8), "parts": ("0", "1")}
    model[0], model[1] = make_sparse(model[0], "block", **options), nn.Identity()
    x = torch.randn(2, 32, 6, 6)
    expected = model(x)
    save(model, path)
    fresh = load(path, net()).eval()
    assert fresh[0].format == "block" and fresh[0].pack().block == (16, 8)
    assert same_bits(model, fresh)
    assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("name", ["bitmap", "delta", "semi_structured"])
def test_what_a_gpu_laid_out_becomes_what_a_cpu_has_kernels_for(path, name):
    dense = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 5))
    with torch.no_grad():
        dense[0].weight[:, ::2] = 0
        dense[0].weight[:, 1::8] = 0
    net = copy.deepcopy(dense)
    net[0] = SparseLinear.from_dense(dense[0], name)
    x = torch.randn(7, 24)
    torch.testing.assert_close(net(x), dense(x))
    save(net, path)
    loaded = load(path, copy.deepcopy(dense))
    assert loaded[0].format == ("nm" if name == "semi_structured" else "unstructured")
    assert torch.equal(loaded[0].weight, dense[0].weight)
    assert loaded[0].values.numel() == int(dense[0].weight.count_nonzero())  # no fillers
    torch.testing.assert_close(loaded(x), dense(x))
