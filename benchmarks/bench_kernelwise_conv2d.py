"""kernelwise_conv2d beside dense convolution: plain, channels_last, and fused with ReLU + pool."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shapes import CONV, pruned_conv

import liveweight as lw

LAYERS = CONV | {
    "vgg.conv4": (128, 128, 3, 16, 1, 1),
    "vgg.conv11": (512, 512, 3, 4, 1, 1),
    "resnet50.1x1": (256, 256, 1, 14, 1, 0),
}


def dense(x, weight, stride, padding):
    return lambda: F.conv2d(x, weight, None, stride, padding)


def dense_channels_last(x, weight, stride, padding):
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return lambda: F.conv2d(x, weight, None, stride, padding)


def dense_prepacked(x, weight, stride, padding):
    how = ([padding] * 2, [stride] * 2, [1, 1], 1)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *how, list(x.shape))
    run = torch.ops.mkldnn._convolution_pointwise
    return lambda: run(x, packed, None, *how, "none", [], "")


def im2col_csr(x, weight, stride, padding):
    csr = weight.flatten(1).to_sparse_csr()

    def call():
        columns = F.unfold(x, weight.shape[2:], padding=padding, stride=stride)  # [B, K, P]
        product = torch.mm(csr, columns.transpose(0, 1).flatten(1))
        side = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
        return product.view(weight.shape[0], len(x), side, side).transpose(0, 1)

    return call


def liveweight(x, weight, stride, padding):
    packed = lw.formats.Kernelwise.from_dense(weight)
    return lambda: lw.ops.kernelwise_conv2d(x, packed, stride=stride, padding=padding)


def liveweight_batch_last(x, weight, stride, padding):
    packed = lw.formats.Kernelwise.from_dense(weight)
    x = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return lambda: lw.ops.kernelwise_conv2d(x, packed, stride=stride, padding=padding)


CALLS = (
    dense,
    dense_channels_last,
    dense_prepacked,
    im2col_csr,
    liveweight,
    liveweight_batch_last,
)


@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sparsity", [0.7, 0.9, 0.95])
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("layer", LAYERS)
def test_kernelwise_conv2d(measure, layer, batch, sparsity, call):
    inp, out, kernel, side, stride, padding = LAYERS[layer]
    weight, x = pruned_conv(out, inp, kernel, sparsity), torch.randn(batch, inp, side, side)
    expected = F.conv2d(x, weight, None, stride, padding)
    group = f"{layer} batch {batch} kernels removed {sparsity}"
    measure(group, call(x, weight, stride, padding), expected)


@pytest.mark.parametrize("name", ["dense chain", "liveweight fused"])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("layer", ["lenet5.conv1", "lenet5.conv2"])
def test_conv_relu_pool(measure, layer, batch, name):
    inp, out, kernel, side, *_ = CONV[layer]
    weight, x = pruned_conv(out, inp, kernel, 0.8), torch.randn(batch, inp, side, side)
    packed = lw.formats.Kernelwise.from_dense(weight)

    def chain():
        return F.max_pool2d(F.relu(F.conv2d(x, weight)), 2)

    def fused():
        return lw.ops.kernelwise_conv2d(x, packed, activation="relu", pool=2)

    call = chain if name == "dense chain" else fused
    measure(f"{layer} + ReLU + 2x2 max pool, batch {batch}, kernels removed 0.8", call, chain())
