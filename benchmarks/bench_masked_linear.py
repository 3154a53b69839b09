"""masked_linear beside the product with a masked copy of the weight and with a dense weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import liveweight as lw


@pytest.mark.parametrize("name", ["dense", "weight * mask", "liveweight"])
@pytest.mark.parametrize("batch", [64, 512])
def test_masked_linear(measure, batch, name):
    weight, x = torch.randn(1024, 1024), torch.randn(batch, 1024)
    mask = torch.rand_like(weight) < 0.1
    bits = lw.ops.pack_mask_bits(mask)
    calls = {
        "dense": lambda: F.linear(x, weight),
        "weight * mask": lambda: F.linear(x, weight * mask),
        "liveweight": lambda: lw.ops.masked_linear(x, weight, bits),
    }
    expected = None if name == "dense" else F.linear(x, weight * mask)
    measure(f"1024x1024 batch {batch} density 0.1", calls[name], expected)
