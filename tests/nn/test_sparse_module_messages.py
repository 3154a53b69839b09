"""What SparseLinear and SparseConv2d say when an argument is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from liveweight.formats import Kernelwise, Unstructured
from liveweight.nn import SparseConv2d, SparseLinear

EYE = Unstructured.from_dense(torch.eye(3))
KERNELS = Kernelwise.from_dense(torch.ones(3, 1, 1, 1))
BROKEN = dataclasses.replace(EYE, columns=EYE.columns + 9)
BAD = {
    "linear from conv": (
        lambda: SparseLinear.from_dense(nn.Conv2d(1, 1, 1)),
        TypeError,
        "an nn.Linear, got Conv2d",
    ),
    "conv from linear": (
        lambda: SparseConv2d.from_dense(nn.Linear(1, 1)),
        TypeError,
        "an nn.Conv2d, got Linear",
    ),
    "transposed": (
        lambda: SparseConv2d.from_dense(nn.ConvTranspose2d(1, 1, 1)),
        TypeError,
        "got ConvTranspose2d",
    ),
    "format": (
        lambda: SparseLinear.from_dense(nn.Linear(1, 1), "csr"),
        ValueError,
        "one of 'auto', 'unstructured'.*got 'csr'",
    ),
    "conv format": (
        lambda: SparseConv2d.from_dense(nn.Conv2d(1, 1, 1), "csr"),
        ValueError,
        "one of 'auto', 'kernelwise'.*got 'csr'",
    ),
    "padding mode": (
        lambda: SparseConv2d.from_dense(nn.Conv2d(1, 1, 1, padding_mode="reflect")),
        ValueError,
        "padding_mode must be 'zeros', got 'reflect'",
    ),
    "weight": (
        lambda: SparseLinear(torch.eye(3)),
        TypeError,
        "must be formats.Unstructured.*got Tensor; SparseLinear.from_dense",
    ),
    "conv weight": (
        lambda: SparseConv2d(EYE),
        TypeError,
        "must be formats.Kernelwise.*got Unstructured",
    ),
    "bias": (
        lambda: SparseLinear(EYE, torch.ones(4)),
        ValueError,
        r"expected bias \[3\], got \(4,\)",
    ),
    "activation": (
        lambda: SparseLinear(EYE, activation="tanh"),
        ValueError,
        "'gelu_tanh', got 'tanh'",
    ),
    "conv activation": (
        lambda: SparseConv2d(KERNELS, activation="gelu"),
        ValueError,
        "None or 'relu', got 'gelu'",
    ),
    "groups": (
        lambda: SparseConv2d(KERNELS, groups=2),
        ValueError,
        "3 filters do not form groups=2",
    ),
    "stride": (lambda: SparseConv2d(KERNELS, stride=0), ValueError, "stride must be >= 1, got 0"),
    "pool": (
        lambda: SparseConv2d(KERNELS, pool=0),
        ValueError,
        "pool must be a whole number >= 1, got 0",
    ),
    "broken": (lambda: SparseLinear(BROKEN), ValueError, "columns reach 11, beyond shape"),
    "x": (
        lambda: SparseLinear(EYE)(torch.ones(2, 4)),
        ValueError,
        r"expected x \[..., 3\], got \(2, 4\)",
    ),
    "conv x": (
        lambda: SparseConv2d(KERNELS)(torch.ones(2, 4, 3, 3)),
        ValueError,
        r"expected x \[B, 1, H, W\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_messages(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
