"""activity_stats_ (four statistics, one read) beside eager PyTorch for the mean alone."""

from __future__ import annotations

import pytest
import torch

import liveweight as lw

# name: (shape of x, per)
CASES = {
    "linear 512x4096": ((512, 4096), "feature"),
    "linear 60000x784": ((60000, 784), "feature"),
    "conv map 32x64x32x32": ((32, 64, 32, 32), "map"),
    "conv channel 32x64x32x32": ((32, 64, 32, 32), "channel"),
}


def reduced_dims(per: str) -> tuple[int, ...]:
    return {"feature": (0,), "map": (0,), "channel": (0, 2, 3)}[per]


@pytest.mark.parametrize("name", ["eager mean|x|", "eager all four", "liveweight all four"])
@pytest.mark.parametrize("case", CASES)
def test_activity_stats(measure, case, name):
    shape, per = CASES[case]
    x, dims = torch.randn(shape), reduced_dims(CASES[case][1])
    features = x.abs().sum(dims).numel()
    stats = lw.ops.new_activity_stats(features)

    def mean():
        return x.abs().mean(dims)

    def four():
        a = x.abs()
        return a.sum(dims), (x * x).sum(dims), (a > 0).sum(dims), a.amax(dims)

    def ours():
        return lw.ops.activity_stats_(stats, x, per=per)

    call = {"eager mean|x|": mean, "eager all four": four, "liveweight all four": ours}[name]
    measure(case, call)
