"""SparseLinear and SparseConv2d in every format: numbers, choices of "auto", copies, layouts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from liveweight.nn import SparseConv2d, SparseLinear
from liveweight.nn.sparse_linear import GPU_LAYOUTS, fits_two_of_four, layout_for


def linear(format: str) -> nn.Linear:
    layer = nn.Linear(64, 48)
    keep = torch.rand(48, 64) < 0.3
    if format == "block":
        keep = (torch.rand(3, 4) < 0.5).repeat_interleave(16, 0).repeat_interleave(16, 1)
        keep[:16, :16] = False
    if format in ("nm", "semi_structured"):
        keep = torch.tensor([True, False, False, True]).repeat(48, 16)
    with torch.no_grad():
        layer.weight *= keep
    return layer


def conv(format: str) -> nn.Conv2d:
    channels, filters = (32, 48) if format == "block" else (8, 12)
    layer = nn.Conv2d(channels, filters, 3, padding=1)
    with torch.no_grad():
        if format == "block":
            keep = torch.tensor([[True, False], [False, True], [False, False]])
            keep = keep.repeat_interleave(16, 0).repeat_interleave(16, 1)
            layer.weight *= keep[:, :, None, None]
            return layer
        shape = (12, 8, 1, 1) if format == "kernelwise" else (12, 8, 3, 3)
        layer.weight *= torch.rand(shape) < 0.3
    return layer


LAYERS = [(linear, n) for n in SparseLinear.formats] + [(conv, n) for n in SparseConv2d.formats]


def both(make, name: str, **options):
    layer = make(name)
    kind = SparseLinear if make is linear else SparseConv2d
    x = torch.randn(5, 64) if make is linear else torch.randn(5, layer.in_channels, 9, 9)
    return layer, kind.from_dense(layer, name, **options), x


@pytest.mark.parametrize("make,name", LAYERS)
def test_numbers_gradients_and_copies(make, name):
    layer, module, x = both(make, name)
    assert module.format == name and torch.equal(module.weight, layer.weight)
    torch.testing.assert_close(module(x), layer(x), rtol=1e-4, atol=1e-5)
    grads = []
    for net in (module, layer):
        given = x.clone().requires_grad_()
        net(given).pow(2).sum().backward()
        grads.append((given.grad, net.bias.grad))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    assert bool(module.values.grad.any())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    twin = copy.deepcopy(module)
    nn.init.zeros_(twin.values)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))
    assert f"format={name}" in repr(module)


@pytest.mark.parametrize("make,name", LAYERS)
def test_compiles(make, name):
    _, module, x = both(make, name)
    module.eval().requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


# Blocks of a convolution are for GPUs: on a CPU "auto" stores their kernels.
# What "auto" never takes on a CPU.
NAMED = ("nm", *GPU_LAYOUTS)


@pytest.mark.parametrize(
    "make,name", [(m, n) for m, n in LAYERS if n not in NAMED and (m, n) != (conv, "block")]
)
def test_auto_sees_where_zeros_are(make, name):
    layer = make(name)
    kind = SparseLinear if make is linear else SparseConv2d
    assert kind.from_dense(layer).format == name


def test_gelu_in_linear():
    for name in SparseLinear.formats:
        layer, module, x = both(linear, name, activation="gelu")
        torch.testing.assert_close(module(x), nn.GELU()(layer(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(SparseConv2d.formats))
def test_layouts_change_strides_only(name):
    _, module, x = both(conv, name)
    want = module(x)
    for layout in ("contiguous", "channels_last", "batch_last"):
        module.layout = layout
        got = module(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        order = {"contiguous": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1)}
        assert got.permute(order.get(layout, (1, 2, 3, 0))).is_contiguous()
        torch.testing.assert_close(module(x), nn.Identity()(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["unstructured", "block"])
def test_batch_last_changes_strides_only(name):
    _, module, x = both(linear, name)
    want = module(x)
    module.batch_last = True
    got = module(x)
    torch.testing.assert_close(got, want)
    assert got.t().is_contiguous()


def test_nm_refuses_what_is_not():
    with pytest.raises(ValueError, match="at most 2 of 4 entries kept"):
        SparseLinear.from_dense(nn.Linear(8, 2), "nm")


def test_blocks_of_convolutions():
    layer = conv("block")
    module = SparseConv2d.from_dense(layer, block=(16, 32))
    assert module.format == "block" and module.pack().block == (16, 32)
    assert SparseConv2d.from_dense(layer).format == "kernelwise"
    assert SparseConv2d.from_dense(layer, "block").pack().block == (16, 16)
    kernels = layer.weight.flatten(2).ne(0).any(2)
    kernels[-1, -1] = True
    module = SparseConv2d.from_dense(layer, "block", mask=kernels)
    assert module.density == 3 / 6 and "backend=reference" in repr(module)


def test_blocks_take_in_relu_and_pool_and_one_sample():
    layer = conv("block").eval()
    module = SparseConv2d.from_dense(layer, "block", activation="relu", pool=2).eval()
    x = torch.randn(3, 32, 9, 8)
    want = nn.functional.max_pool2d(layer(x).relu(), 2)
    for layout in (None, "contiguous", "channels_last", "batch_last"):
        module.layout = layout
        torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module(x[0]), want[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"outputs of \(1, 8\) are too small for pool=2"):
        module(x[:, :, :1])


def test_blocks_must_not_cross_groups():
    layer = nn.Conv2d(32, 48, 3, groups=2)
    with pytest.raises(ValueError, match="blocks of 16 filters cross groups"):
        SparseConv2d.from_dense(layer, block=(16, 16))
    with pytest.raises(ValueError, match="48 filters / 2 groups"):
        SparseConv2d.from_dense(layer, "block")
    layer = nn.Conv2d(32, 64, 3, groups=2)
    module = SparseConv2d.from_dense(layer, "block")
    assert module.pack().block == (32, 16)
    x = torch.randn(2, 32, 5, 5)
    torch.testing.assert_close(module(x), layer(x), rtol=1e-4, atol=1e-5)


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU: enough to ask for a layout."""

    is_cuda = True


def test_gpu_layouts_follow_density_and_pattern():
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    weight[:, ::4] = 1  # 25 % kept
    on_gpu = weight.as_subclass(OnGpu)
    assert layout_for("unstructured", on_gpu) == "bitmap"
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, ::8] = True
    assert layout_for("unstructured", on_gpu, mask) == "delta"
    assert layout_for("nm", on_gpu) == "semi_structured"
    assert layout_for("block", on_gpu) == "block"
    assert layout_for("unstructured", weight) == "unstructured"
    assert layout_for("unstructured", weight.float().as_subclass(OnGpu)) == "unstructured"


def test_two_of_four_is_seen_with_ragged_ends():
    weight = torch.ones(2, 10)
    weight[:, 1::2] = 0
    assert fits_two_of_four(weight)
    weight[1, 9] = 1
    assert fits_two_of_four(weight)  # columns 8 and 9 are a group of their own
    weight[0, 1] = 1
    assert not fits_two_of_four(weight)


def test_deltas_are_laid_out_for_the_samples_of_a_call():
    layer = linear("delta")
    one, eight = (SparseLinear.from_dense(layer, "delta", samples=n) for n in (1, 8))
    assert one.pack().layout != eight.pack().layout
    assert torch.equal(one.weight, eight.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ["auto", "unstructured", "nm"])
def test_a_layer_on_a_gpu_gets_a_layout_with_a_kernel(gpu, format, dtype):
    layer = linear("nm").to(gpu, dtype)
    module = SparseLinear.from_dense(layer, format)
    wanted = {"auto": "semi_structured", "unstructured": "bitmap", "nm": "semi_structured"}
    assert module.format == wanted[format] and "backend=cuda c++" in repr(module)
    for tokens in (1, 7, 64, 200):
        x = torch.randn(tokens, 64, device=gpu, dtype=dtype)
        want = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        torch.testing.assert_close(module(x).double(), want, rtol=2e-2, atol=2e-2)
