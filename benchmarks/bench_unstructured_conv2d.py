"""unstructured_conv2d beside dense convolution (torch's, oneDNN pre-packed) and im2col + CSR."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shapes import prune_weights

import liveweight as lw

# name: (in_channels, out_channels, kernel, height = width)
LAYERS = {
    "64@32x32": (64, 64, 3, 32),
    "128@16x16": (128, 128, 3, 16),
    "256@8x8": (256, 256, 3, 8),
    "512@4x4": (512, 512, 3, 4),
    "1x1 256@14x14": (256, 256, 1, 14),
}


def dense(x, weight, padding):
    return lambda: F.conv2d(x, weight, None, 1, padding)


def dense_channels_last(x, weight, padding):
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return lambda: F.conv2d(x, weight, None, 1, padding)


def dense_packed(x, weight, padding):
    """oneDNN with its own weight layout and channels-last activations: the strongest dense."""
    settings = ([padding, padding], [1, 1], [1, 1], 1)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, list(x.shape))
    x = x.contiguous(memory_format=torch.channels_last)
    tail = (None, *settings, "none", [], "")
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, packed, *tail)


def im2col_csr(x, weight, padding):
    csr = weight.flatten(1).to_sparse_csr()

    def call():
        columns = F.unfold(x, weight.shape[2:], padding=padding)  # [B, K, P]
        product = torch.mm(csr, columns.transpose(0, 1).flatten(1))
        return product.view(weight.shape[0], len(x), *x.shape[2:]).transpose(0, 1)

    return call


def liveweight(x, weight, padding):
    packed = lw.formats.UnstructuredKernels.from_dense(weight)
    return lambda: lw.ops.unstructured_conv2d(x, packed, padding=padding)


def liveweight_batch_last(x, weight, padding):
    packed = lw.formats.UnstructuredKernels.from_dense(weight)
    x = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return lambda: lw.ops.unstructured_conv2d(x, packed, padding=padding)


CALLS = (
    dense,
    dense_channels_last,
    dense_packed,
    im2col_csr,
    liveweight,
    liveweight_batch_last,
)


@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sparsity", [0.7, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("layer", LAYERS)
def test_unstructured_conv2d(measure, layer, batch, sparsity, call):
    inp, out, kernel, side = LAYERS[layer]
    padding = kernel // 2
    weight = prune_weights((out, inp, kernel, kernel), sparsity)
    x = torch.randn(batch, inp, side, side)
    expected = F.conv2d(x, weight, None, 1, padding)
    measure(f"{layer} batch {batch} weights removed {sparsity}", call(x, weight, padding), expected)
