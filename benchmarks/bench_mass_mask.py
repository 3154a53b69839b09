"""mass_mask (threshold search) beside sort and cumulative sum."""

from __future__ import annotations

import pytest
import torch

import liveweight as lw


def sort_and_cumsum(scores, alpha):
    def call():
        ordered, index = scores.sort(dim=1, descending=True, stable=True)
        total = ordered.cumsum(1, dtype=torch.float64)
        keep = total - ordered < alpha * total[:, -1:]
        return torch.zeros_like(keep).scatter_(1, index, keep)

    return call


def liveweight(scores, alpha):
    return lambda: lw.ops.mass_mask(scores, alpha)


@pytest.mark.parametrize("call", [sort_and_cumsum, liveweight], ids=lambda f: f.__name__)
@pytest.mark.parametrize("alpha", [0.9, 0.95])
@pytest.mark.parametrize("shape", [(300, 785), (512, 4609), (4096, 4096)], ids=str)
def test_mass_mask(measure, shape, alpha, call):
    scores = torch.randn(shape).abs()
    measure(f"{shape} alpha {alpha}", call(scores, alpha))
