"""SparseLinear and SparseConv2d do what users of nn.Linear and nn.Conv2d expect."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from liveweight.formats import Kernelwise, Unstructured
from liveweight.nn import SparseConv2d, SparseLinear


def dense_layer(kind: str, **options) -> nn.Module:
    """Return a Linear or Conv2d of which about two thirds are zero."""
    if kind == "linear":
        layer = nn.Linear(12, 9, **options)
        shape = (9, 12)
    else:
        layer = nn.Conv2d(4, 6, 3, **{"padding": 1} | options)
        shape = (*layer.weight.shape[:2], 1, 1)
    with torch.no_grad():
        layer.weight *= torch.rand(shape) < 0.35
    return layer


def sparse_of(layer: nn.Module, **options):
    kind = SparseLinear if isinstance(layer, nn.Linear) else SparseConv2d
    return kind.from_dense(layer, **options)


def example(layer: nn.Module, batch: int = 5) -> torch.Tensor:
    shape = (12,) if isinstance(layer, (nn.Linear, SparseLinear)) else (layer.in_channels, 8, 8)
    return torch.randn(batch, *shape)


@pytest.fixture(params=["linear", "conv"])
def layer(request) -> nn.Module:
    return dense_layer(request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_same_numbers_as_the_dense_layer(kind, bias):
    layer = dense_layer(kind, bias=bias)
    module, x = sparse_of(layer), example(layer)
    torch.testing.assert_close(module(x), layer(x))
    torch.testing.assert_close(module(x[0]), layer(x[0]))
    assert torch.equal(module.weight, layer.weight)
    assert (module.bias is None) == (not bias)
    assert not bias or torch.equal(module.bias, layer.bias)


def test_fused_activation_and_pool(layer):
    x, wanted = example(layer), nn.Sequential(layer, nn.ReLU())
    options = {"activation": "relu"}
    if isinstance(layer, nn.Conv2d):
        wanted.append(nn.MaxPool2d(2))
        options["pool"] = 2
    torch.testing.assert_close(sparse_of(layer, **options)(x), wanted(x))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"padding": (0, 2)},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"padding": "same"},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_conv_options(options):
    layer = dense_layer("conv", **options)
    module, x = sparse_of(layer), example(layer)
    torch.testing.assert_close(module(x), layer(x))
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
        assert getattr(module, name) == getattr(layer, name)
    assert module.padding_mode == "zeros" and len(module.padding) == 2


def test_even_kernels_pad_both_sides_only_in_numbers():
    layer = nn.Conv2d(2, 2, (4, 3), padding="same")
    with pytest.raises(ValueError, match=r"padding='same' with kernel_size=\(4, 3\)"):
        SparseConv2d.from_dense(layer)
    layer = nn.Conv2d(2, 2, 4, padding="same", dilation=2)
    x = torch.randn(1, 2, 9, 9)
    torch.testing.assert_close(SparseConv2d.from_dense(layer)(x), layer(x))


def test_tensors_are_copies_and_mode_follows(layer):
    module = sparse_of(layer.eval())
    before = module.values.detach().clone()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    assert torch.equal(module.values, before) and bool(module.bias.any())
    assert not module.training and sparse_of(layer.train()).training


def test_torch_prune_masks_are_applied(layer):
    with torch.no_grad():
        layer.weight.normal_()
    prune.random_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.5)
    x = example(layer)
    module = sparse_of(layer)
    torch.testing.assert_close(module(x), layer(x))
    assert (
        module.values.is_leaf and isinstance(layer, type(layer)) and hasattr(layer, "weight_orig")
    )
    with torch.no_grad():
        layer.weight_orig.mul_(2)  # layer.weight is stale until the next call of layer
    assert torch.equal(sparse_of(layer).weight, layer.weight_orig * layer.weight_mask)


def test_mask_buffers_are_applied(layer):
    mask = torch.rand_like(layer.weight) < 0.5
    layer.register_buffer("weight_mask", mask)
    assert torch.equal(sparse_of(layer).weight, layer.weight * mask)


def test_parametrizations_are_applied(layer):
    class Halve(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(layer, "weight", Halve())
    assert torch.equal(sparse_of(layer).weight, layer.weight)


def test_mask_keeps_zeros(layer):
    mask = torch.ones_like(layer.weight, dtype=torch.bool)
    module = sparse_of(layer, mask=mask)
    assert module.density == 1.0 and module.sparsity == 0.0
    torch.testing.assert_close(module(x := example(layer)), layer(x))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_nothing_kept(kind):
    layer = dense_layer(kind)
    nn.init.zeros_(layer.weight)
    module, x = sparse_of(layer), example(layer)
    assert module.values.numel() == 0 and module.sparsity == 1.0
    torch.testing.assert_close(module(x), layer(x))
    module(x).sum().backward()
    assert module.bias.grad is not None


def test_gradients(layer):
    module, x = sparse_of(layer, activation="relu"), example(layer)
    results = []
    for net in (module, nn.Sequential(layer, nn.ReLU())):
        inputs = x.clone().requires_grad_()
        net(inputs).pow(2).sum().backward()
        results.append(inputs.grad)
    torch.testing.assert_close(*results)
    if isinstance(layer, nn.Conv2d):
        kept = layer.weight.ne(0).flatten(2).any(2)
    else:
        kept = module.pack().coordinates()
    torch.testing.assert_close(module.values.grad, layer.weight.grad[kept], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.bias.grad, layer.bias.grad, rtol=1e-4, atol=1e-4)


def test_dense_weight_passes_gradients_to_the_values(layer):
    module = sparse_of(layer)
    module.weight.sum().backward()
    assert bool((module.values.grad == 1).all())


def test_it_trains(layer):
    module, x = sparse_of(layer), example(layer)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (module(x) - 1).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_copies(layer):
    module, x = sparse_of(layer, activation="relu"), example(layer)
    module.parts = ("a", "b")
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    others = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    ]
    for other in others:
        assert torch.equal(other(x), module(x)) and other.parts == ("a", "b")
        assert other.values.data_ptr() != module.values.data_ptr()


def test_state_dict(layer):
    module, x = sparse_of(layer), example(layer)
    state = module.state_dict()
    index = module.index_names
    assert set(state) == {"values", "bias", *index}
    twin = copy.deepcopy(module)
    nn.init.zeros_(twin.values)
    twin.load_state_dict(state)
    assert torch.equal(twin(x), module(x))


def other_pattern(layer: nn.Module) -> nn.Module:
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.fill_(1.0)
    return sparse_of(other)


@pytest.mark.parametrize("strict", [True, False])
def test_state_of_another_pattern_is_refused_whole(layer, strict):
    model = nn.ModuleDict({"fc": other_pattern(layer)})
    before = copy.deepcopy(model.state_dict())
    state = nn.ModuleDict({"fc": sparse_of(layer)}).state_dict()
    with pytest.raises(RuntimeError, match=r"fc: the state's values has shape \(.*another pattern"):
        model.load_state_dict(state, strict=strict)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_broken_state_is_refused(layer):
    module = sparse_of(layer)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    state["columns" if isinstance(layer, nn.Linear) else "channels"][0] = 255
    with pytest.raises(RuntimeError, match=r"got 255|columns (reach 255|must rise)"):
        module.load_state_dict(state)


def test_missing_keys_are_named(layer):
    module = sparse_of(layer)
    state = module.state_dict()
    del state["values"]
    with pytest.raises(RuntimeError, match='Missing key.*"values"'):
        module.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_dtype(layer, dtype):
    module, x = sparse_of(layer).to(dtype), example(layer).to(dtype)
    index = [buffer.dtype for buffer in sparse_of(layer).buffers()]
    assert index == [buffer.dtype for buffer in module.buffers()]
    close = 1e-10 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(module(x), layer.to(dtype)(x), rtol=close, atol=close)
    assert ("backend=reference" in repr(module)) == (dtype == torch.float64)


def test_to_device(layer):
    module = sparse_of(layer).to("meta")
    assert {t.device.type for t in module.state_dict().values()} == {"meta"}
    assert module(example(layer).to("meta")).shape == layer(example(layer)).shape


def test_repr():
    module = SparseLinear.from_dense(nn.Linear(4, 2), activation="relu")
    module.parts = ("fc", "act")
    text = repr(module)
    for part in ("in_features=4, out_features=2, bias=True", "sparsity=0,", "format=unstructured"):
        assert part in text
    assert "activation=relu" in text and "parts=('fc', 'act')" in text and "backend=" in text
    module = SparseConv2d.from_dense(nn.Conv2d(4, 2, 3, 2, 1, 2, 2, bias=False), pool=2)
    for part in ("4, 2, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)", "dilation=(2, 2)"):
        assert part in repr(module)
    assert "groups=2, pool=2, bias=False" in repr(module)


def test_first_line_of_the_docstring_says_weight_sparse():
    for kind in (SparseLinear, SparseConv2d):
        assert "Weight-sparse (not activation-sparse)" in kind.__doc__.splitlines()[0]


def make_net() -> nn.Module:
    """Return Conv -> ReLU -> pool -> Conv -> ReLU -> Linear -> Linear of sparse modules."""
    conv1 = nn.Conv2d(1, 4, 3, padding=1)
    conv2 = nn.Conv2d(4, 4, 3, padding=1, stride=2)
    fc1, fc2 = nn.Linear(16, 12), nn.Linear(12, 3)
    with torch.no_grad():
        for layer in (conv1, conv2, fc1, fc2):
            tail = (1,) * (layer.weight.dim() - 2)
            layer.weight *= torch.rand(*layer.weight.shape[:2], *tail) < 0.6
    return nn.Sequential(
        SparseConv2d.from_dense(conv1, activation="relu", pool=2),
        SparseConv2d.from_dense(conv2, activation="relu"),
        nn.Flatten(),
        SparseLinear.from_dense(fc1, activation="relu"),
        SparseLinear.from_dense(fc2),
    )


def test_compile_a_whole_net():
    net, x = make_net(), torch.randn(3, 1, 8, 8)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).sum().backward()
    got = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    net(x).sum().backward()
    for grad, parameter in zip(got, net.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("grad", [True, False])
def test_export_a_whole_net(grad):
    net, x = make_net().eval(), torch.randn(3, 1, 8, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    ops = {str(node.target) for node in program.graph.nodes}
    assert {"liveweight.kernelwise_conv2d.default", "liveweight.unstructured_linear.default"} <= ops
    more = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(program.module()(more), net(more))


def test_functional_call_swaps_the_values(layer):
    module, x = sparse_of(layer), example(layer)
    doubled = {"values": module.values.detach() * 2}
    got = torch.func.functional_call(module, doubled, (x,))
    bias = module.bias if isinstance(layer, nn.Linear) else module.bias[:, None, None]
    torch.testing.assert_close(got, 2 * module(x) - bias, rtol=1e-4, atol=1e-5)


def test_construct_from_a_format():
    weight = Unstructured.from_dense(torch.eye(3))
    module = SparseLinear(weight, torch.ones(3), activation="relu", parts=["a"])
    assert module.parts == ("a",) and torch.equal(module(torch.eye(3)), torch.eye(3) + 1)
    kernels = Kernelwise.from_dense(torch.ones(2, 1, 1, 1))
    assert SparseConv2d(kernels, groups=2)(torch.ones(1, 2, 3, 3)).sum() == 18
