"""What compress_ joins into a layer: BatchNorm, activations, pooling; packed dense layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight.compress import compress_, load, save
from liveweight.compress.fold import fold_norm
from liveweight.nn import PackedConv2d, PackedLinear, SparseConv2d, SparseLinear

PACKED_FASTER = {"packed": 5.0, "packed_relu": 4.0, "packed_norm": 4.0, "packed_norm_relu": 3.0}


class Mixed(nn.Module):
    """BatchNorm after a convolution and a Linear, ReLU and GELU as modules; 3x8x8 -> 5."""

    def __init__(self, approximate: str = "none", affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(8, affine=affine), nn.ReLU()
        self.pool, self.flatten = nn.MaxPool2d(2), nn.Flatten()
        self.fc1, self.bn2 = nn.Linear(8 * 4 * 4, 12), nn.BatchNorm1d(12, affine=affine)
        self.fc2, self.gelu = nn.Linear(12, 9), nn.GELU(approximate=approximate)
        self.fc3 = nn.Linear(9, 5)

    def forward(self, x):
        x = self.flatten(self.pool(self.relu(self.bn1(self.conv(x)))))
        return self.fc3(self.gelu(self.fc2(self.bn2(self.fc1(x)))))


def settle(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


def agree(model, dense, x, atol=1e-5):
    with torch.no_grad():
        assert torch.allclose(model(x), dense(x), atol=atol)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_is_exact_to_rounding(affine, bias):
    conv = nn.Conv2d(4, 6, 3, groups=2, bias=bias)
    norm = nn.BatchNorm2d(6, affine=affine)
    pair = settle(nn.Sequential(conv, norm))
    with torch.no_grad():
        norm.running_mean.mul_(100)  # a large mean must not cost digits
        folded = fold_norm(conv, norm)
        x = torch.randn(2, 4, 5, 5)
        exact = copy.deepcopy(pair).double()(x.double())
        assert folded.bias is not None and type(folded) is nn.Conv2d
        error = (folded(x).double() - exact).abs().max()
        assert error <= 2e-6 * exact.abs().max()


def test_sparse_layers_take_in_norms(nets):
    model = nets.sparsify(settle(Mixed()), 0.3)
    dense, x = copy.deepcopy(model), torch.randn(3, 3, 8, 8)
    clock = nets.Clock(kernelwise_norm_relu_pool=3.0, unstructured_norm=3.0)
    report = compress_(model, x, measure=clock)
    agree(model, dense, x)
    assert isinstance(model.conv, SparseConv2d) and isinstance(model.fc1, SparseLinear)
    assert model.conv.parts == ("conv", "bn1", "relu", "pool")
    assert (model.conv.activation, model.conv.pool) == ("relu", 2)
    assert model.fc1.parts == ("fc1", "bn2")
    for name in ("bn1", "relu", "pool", "bn2"):
        assert type(model.get_submodule(name)) is nn.Identity
    row = report.layers[0]
    assert row.chosen == "kernelwise" and row.parts == model.conv.parts
    assert row.chain == ("conv", "bn1", "relu", "pool")
    assert torch.equal(
        model.conv.weight.ne(0).flatten(2).any(2), dense.conv.weight.ne(0).flatten(2).any(2)
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_packed_dense_takes_in_norms_and_activations(nets, approximate, tmp_path):
    model = settle(Mixed(approximate))
    dense, x = copy.deepcopy(model), torch.randn(3, 3, 8, 8)
    name = "gelu" if approximate == "none" else "gelu_tanh"
    clock = nets.Clock(**PACKED_FASTER, **{f"packed_{name}": 4.0})
    report = compress_(model, x, measure=clock)
    agree(model, dense, x)
    assert isinstance(model.conv, PackedConv2d) and isinstance(model.fc3, PackedLinear)
    assert (model.conv.activation, model.fc2.activation) == ("relu", name)
    assert type(model.pool) is nn.MaxPool2d and type(model.gelu) is nn.Identity
    assert report.changed == ["conv", "fc1", "fc2", "fc3"]
    assert {row.chosen for row in report.layers} == {"dense, packed"}
    assert compress_(model, x, measure=clock).layers[0].reason == "already dense, packed"

    save(model, tmp_path / "net.safetensors")
    fresh = load(tmp_path / "net.safetensors", Mixed(approximate)).eval()
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    assert fresh.conv.parts == model.conv.parts and fresh.conv.bias is not None


def test_checkpoint_of_folded_sparse_layers(nets, tmp_path):
    model = nets.sparsify(settle(Mixed()), 0.3)
    x = torch.randn(3, 3, 8, 8)
    clock = nets.Clock(kernelwise_norm_relu=3.0, unstructured_norm=3.0, packed=4.0)
    compress_(model, x, measure=clock)
    assert isinstance(model.fc3, PackedLinear) and model.fc3.weight_mask.dtype == torch.bool
    save(model, tmp_path / "net.safetensors")
    fresh = load(tmp_path / "net.safetensors", Mixed()).eval()
    assert torch.equal(fresh.fc3.weight_mask, model.fc3.weight_mask)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_packed_alone_where_it_is_asked_for(nets):
    model = nets.sparsify(nets.settle(nets.LeNet()), 0.2)
    clock = nets.Clock(**PACKED_FASTER)
    report = compress_(model, torch.randn(2, 1, 16, 16), formats=["dense"], measure=clock)
    assert clock.races[0] == ["dense", "dense, packed+relu"]
    assert len(report.changed) == 4


def test_training_mode_norms_stay(nets):
    model = nets.sparsify(settle(Mixed()), 0.3)
    model.bn1.train()
    clock = nets.Clock(kernelwise=5.0)
    report = compress_(model, torch.randn(3, 3, 8, 8), measure=clock)
    assert type(model.bn1) is nn.BatchNorm2d
    assert clock.tried(0, "kernelwise") == ["kernelwise"]
    assert any("bn1 was not folded into conv: it is in training mode" in n for n in report.notes)


def test_norms_without_statistics_or_with_hooks_stay(nets):
    model = nets.sparsify(settle(Mixed()), 0.3)
    model.bn1 = nn.BatchNorm2d(8, track_running_stats=False).eval()
    model.bn2.register_forward_hook(lambda *_: None)
    report = compress_(model, torch.randn(3, 3, 8, 8), measure=nets.Clock())
    assert any("keeps no running statistics" in note for note in report.notes)
    assert all(type(row.chain) is tuple and "bn2" not in row.chain for row in report.layers)


def test_a_norm_over_positions_is_not_folded(nets):
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.fc(x))

    model = nets.sparsify(settle(Positions()), 0.4)
    dense, x = copy.deepcopy(model), torch.randn(2, 4, 6)
    report = compress_(model, x, measure=nets.Clock(unstructured=5.0, unstructured_norm=4.0))
    agree(model, dense, x)
    assert report.layers[0].chain == ("fc",) and type(model.norm) is nn.BatchNorm1d


def test_pool_behind_a_functional_relu_joins_without_it(nets):
    model = nets.sparsify(nets.settle(nets.NormNet(padding=1)), 0.3)
    dense, x = copy.deepcopy(model), torch.randn(3, 3, 8, 8)
    clock = nets.Clock(kernelwise_norm=5.0, kernelwise_norm_pool=4.0)
    compress_(model, x, measure=clock)
    assert clock.tried(0, "kernelwise") == ["kernelwise+norm"]
    assert clock.tried(1, "kernelwise") == ["kernelwise+norm", "kernelwise+norm+pool"]
    assert model.conv2.pool == 2 and model.conv2.activation is None
    agree(model, dense, x, atol=1e-4)


def test_undone_choices_bring_the_norm_back(nets):
    model = nets.sparsify(settle(Mixed()), 0.3)
    modules, dense = list(model.modules()), copy.deepcopy(model)
    x = torch.randn(3, 3, 8, 8)
    compress_(model, x, measure=nets.Clock(whole=12.0, kernelwise_norm_relu=1.0, packed=1.0))
    assert list(model.modules()) == modules
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in model.state_dict().items())


def test_gradients_flow_through_packed_layers(nets):
    model = settle(Mixed())
    dense, x = copy.deepcopy(model), torch.randn(3, 3, 8, 8, requires_grad=True)
    compress_(model, x.detach(), measure=nets.Clock(**PACKED_FASTER, packed_gelu=4.0))
    expected = torch.autograd.grad(F.cross_entropy(dense(x), torch.arange(3)), x)[0]
    got = torch.autograd.grad(F.cross_entropy(model(x), torch.arange(3)), x)[0]
    assert torch.allclose(got, expected, atol=1e-5)
