"""kernelwise_conv2d on a GPU: sizes of real layers, CUDA graphs, beyond 2**31 elements."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from liveweight.formats import Kernelwise
from liveweight.ops import kernelwise_conv2d

pytestmark = pytest.mark.gpu

# (samples, channels, filters, side, kernel, stride, padding): every patch and tile is met.
LAYERS = {
    "56x56": (8, 64, 64, 56, 3, 1, 1),
    "28x28": (8, 128, 128, 28, 3, 1, 1),
    "14x14": (32, 256, 256, 14, 3, 1, 1),
    "7x7": (64, 512, 512, 7, 3, 1, 1),
    "32x32": (32, 64, 64, 32, 3, 1, 1),
    "8x8": (128, 256, 256, 8, 3, 1, 1),
    "4x4": (128, 512, 512, 4, 3, 1, 1),
    "stride 2": (16, 128, 128, 56, 3, 2, 1),
    "1x1": (16, 512, 128, 28, 1, 1, 0),
    "5x5": (16, 64, 192, 27, 5, 1, 2),
    "one sample": (1, 64, 64, 56, 3, 1, 1),
    "7x7, stride 2": (2, 32, 48, 40, 7, 2, 3),
}


def make(gpu, layer: tuple, density: float, dtype: torch.dtype):
    """Return (x, dense weight, format, bias, options) on the GPU."""
    batch, channels, filters, side, kernel, stride, padding = layer
    kept = torch.rand(filters, channels, 1, 1, device=gpu) < density
    weight = torch.randn(filters, channels, kernel, kernel, device=gpu) * kept
    weight = (weight / (channels * density * kernel**2) ** 0.5).to(dtype)
    x = torch.randn(batch, channels, side, side, device=gpu).to(dtype)
    bias = torch.randn(filters, device=gpu).to(dtype)
    return x, weight, Kernelwise.from_dense(weight), bias, {"stride": stride, "padding": padding}


@pytest.mark.parametrize("density", [0.05, 0.25])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_real_nets(gpu, name, layout, density):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        x, weight, packed, bias, options = make(gpu, LAYERS[name], density, dtype)
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        got = kernelwise_conv2d(x, packed, bias, activation="relu", **options)
        want = F.conv2d(x.double(), weight.double(), bias.double(), **options).relu()
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
        assert torch.equal(got, kernelwise_conv2d(x, packed, bias, activation="relu", **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cuda_graph_repeats_it(gpu, dtype):
    x, _, packed, bias, options = make(gpu, LAYERS["14x14"], 0.1, dtype)
    want = kernelwise_conv2d(x, packed, bias, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernelwise_conv2d(x, packed, bias, **options)
    x.zero_()
    graph.replay()
    assert torch.equal(got, bias[:, None, None].expand_as(got))
    assert not torch.equal(got, want)


def test_more_than_2_to_the_31_elements(gpu):
    # 2.2e9 elements, of which only the last sample is looked at.
    x = torch.zeros(2100, 64, 128, 128, device=gpu)
    x[-1] = torch.randn_like(x[-1])
    weight = torch.randn(16, 64, 3, 3, device=gpu)
    got = kernelwise_conv2d(x, Kernelwise.from_dense(weight), padding=1)
    want = F.conv2d(x[-1:].double(), weight.double(), padding=1)
    torch.testing.assert_close(got[-1:].double(), want, rtol=1e-4, atol=1e-4)
    assert not got[0].any()
