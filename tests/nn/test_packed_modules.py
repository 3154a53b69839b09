"""Packed dense modules give the numbers of nn.Linear and nn.Conv2d and keep their manners."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight.nn import PackedConv2d, PackedLinear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
ACTIVATIONS = {
    None: lambda y: y,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def frozen(module):
    return module.requires_grad_(False).eval()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_against_dense(activation, bias):
    dense = nn.Linear(19, 7, bias=bias)
    packed = PackedLinear.from_dense(dense, activation=activation)
    for x in (
        torch.randn(5, 19),
        torch.randn(19),
        torch.randn(2, 3, 19),
        torch.randn(19, 6).t(),
        torch.randn(0, 19),
    ):
        with torch.no_grad():
            expected = ACTIVATIONS[activation](dense(x))
            assert torch.allclose(packed(x), expected, atol=1e-5)
    assert packed.weight is dense.weight and packed._cache is not None


CONVOLUTIONS = [
    {"padding": 1},
    {"stride": 2, "bias": False},
    {"groups": 2, "padding": (0, 2), "dilation": 2},
    {"padding": "same"},
    {"padding": "valid"},
    {"groups": 4},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("layout", [None, "contiguous", "channels_last"])
def test_convolution_against_dense(options, layout):
    dense = nn.Conv2d(4, 8, 3, **options)
    packed = PackedConv2d.from_dense(dense, activation="relu", layout=layout)
    x = torch.randn(3, 4, 9, 11)
    last = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for sample in (x, last, x[:, :, ::2, 1:], x[0], x[:0]):
            assert torch.allclose(packed(sample), dense(sample).relu(), atol=1e-5)
        last_wanted = layout == "channels_last"
        assert packed(x).is_contiguous() is not last_wanted
        if layout is None:
            assert packed(last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_weight_is_held_once(freeze):
    dense = nn.Conv2d(4, 8, 3, groups=2).requires_grad_(not freeze)
    packed = PackedConv2d.from_dense(dense).eval()
    x = torch.randn(2, 4, 6, 6)
    with torch.inference_mode():
        packed(x)
    assert packed.is_packed_only is freeze
    assert torch.equal(packed.weight, dense.weight)
    assert list(packed.state_dict()) == ["weight", "bias"]
    assert torch.equal(packed.state_dict()["weight"], dense.weight)
    assert packed.train()._parameters["weight"].shape == dense.weight.shape
    assert not packed.is_packed_only


@pytest.mark.parametrize("freeze", [True, False])
def test_copies_pickles_and_state(freeze):
    dense = nn.Linear(6, 5).requires_grad_(not freeze)
    packed = PackedLinear.from_dense(dense, activation="relu", parts=("0", "1"))
    x = torch.randn(3, 6)
    with torch.no_grad():
        y = packed(x)
        for twin in (
            copy.deepcopy(packed),
            pickle.loads(pickle.dumps(packed)),
            torch.load(_saved(packed), weights_only=False),
        ):
            assert torch.equal(twin(x), y) and twin.parts == ("0", "1")
            assert twin.weight.requires_grad is not freeze or twin.is_packed_only
        other = PackedLinear.from_dense(nn.Linear(6, 5), activation="relu")
        other(x)
        other.load_state_dict(packed.state_dict())
        assert torch.equal(other(x), y)


def _saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


def test_changes_of_the_weight_are_noticed():
    packed = PackedLinear.from_dense(nn.Linear(4, 3, bias=False))
    x = torch.randn(2, 4)
    with torch.no_grad():
        packed(x)
        packed.weight.mul_(2)
        assert torch.allclose(packed(x), F.linear(x, packed.weight))
        packed.weight.data = torch.ones(3, 4)
        assert torch.allclose(packed(x), x.sum(1, keepdim=True).expand(2, 3))
        packed.weight.data.zero_()
        packed.eval()
        assert not packed(x).any()


def test_gradients_to_input_weight_and_bias():
    dense = nn.Linear(6, 5)
    packed = PackedLinear.from_dense(copy.deepcopy(dense), activation="relu")
    x = torch.randn(3, 6, requires_grad=True)
    expected = torch.autograd.grad(dense(x).relu().sum(), [x, dense.weight, dense.bias])
    got = torch.autograd.grad(packed(x).sum(), [x, packed.weight, packed.bias])
    assert all(torch.allclose(a, b) for a, b in zip(got, expected, strict=True))
    frozen(packed)(x.detach())
    assert packed.is_packed_only
    (grad,) = torch.autograd.grad(packed(x).sum(), [x])
    assert torch.allclose(grad, expected[0], atol=1e-6)


def test_other_dtypes_and_moves():
    x = torch.randn(2, 4, dtype=torch.float64)
    packed = frozen(PackedLinear.from_dense(nn.Linear(4, 3)))
    packed(x.float())
    packed.double()
    assert packed(x).dtype == torch.float64 and packed.weight.dtype == torch.float64


def test_masks_travel_with_the_weight():
    dense = nn.Linear(4, 3)
    dense.register_buffer("weight_mask", torch.rand(3, 4) < 0.5)
    assert torch.equal(PackedLinear.from_dense(dense).weight_mask, dense.weight_mask)


@pytest.mark.parametrize("freeze", [True, False])
def test_compiles_and_exports_in_one_graph(freeze):
    model = nn.Sequential(
        PackedConv2d.from_dense(nn.Conv2d(2, 4, 3), activation="relu"),
        nn.Flatten(),
        PackedLinear.from_dense(nn.Linear(64, 3), activation="gelu"),
    )
    model.requires_grad_(not freeze).eval()
    x = torch.randn(2, 2, 6, 6)
    with torch.no_grad():
        y = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), y, atol=1e-5)
        assert torch.allclose(model(x), y, atol=1e-5) and torch.allclose(compiled(x), y, atol=1e-5)
        exported = torch.export.export(copy.deepcopy(model), (x,)).module()
        assert torch.allclose(exported(x), y, atol=1e-5)


def test_two_threads_at_once():
    packed = frozen(PackedLinear.from_dense(nn.Linear(64, 64)))
    x = torch.randn(8, 64)
    expected = F.linear(x, packed.weight, packed.bias)
    right = []

    def work():
        with torch.inference_mode():
            right.extend(torch.allclose(packed(x), expected, atol=1e-5) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(right) and len(right) == 100


def test_messages():
    with pytest.raises(TypeError, match="expected an nn.Linear, got ReLU"):
        PackedLinear.from_dense(nn.ReLU())
    with pytest.raises(ValueError, match="activation must be one of None, 'relu'.*got 'tanh'"):
        PackedLinear.from_dense(nn.Linear(2, 2), activation="tanh")
    with pytest.raises(TypeError, match="expected an nn.Conv2d, got Linear"):
        PackedConv2d.from_dense(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="padding_mode must be 'zeros'"):
        PackedConv2d.from_dense(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="pads one side more"):
        PackedConv2d.from_dense(nn.Conv2d(2, 2, 2, padding="same"))
    with pytest.raises(ValueError, match="layout must be one of"):
        PackedConv2d.from_dense(nn.Conv2d(2, 2, 2), layout="rows")
    with pytest.raises(RuntimeError):
        frozen(PackedLinear.from_dense(nn.Linear(4, 2)))(torch.randn(2, 3))
    assert "packed for oneDNN" in repr(PackedLinear.from_dense(nn.Linear(2, 2)))
