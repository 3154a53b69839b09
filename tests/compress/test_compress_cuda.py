"""compress_ on a GPU: structured zeros become time, the rest stays dense, numbers stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from liveweight import compress_

pytestmark = pytest.mark.gpu


def keep_blocks_(layer: nn.Linear, density: float, side: int = 64) -> None:
    rows, columns = (-(-size // side) for size in layer.weight.shape)
    mask = (torch.rand(rows, columns, device=layer.weight.device) < density).float()
    full = mask.repeat_interleave(side, 0).repeat_interleave(side, 1)
    with torch.no_grad():
        layer.weight.mul_(full[: layer.out_features, : layer.in_features])


def test_blocks_become_time_and_dense_layers_stay(gpu):
    net = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000))
    net = net.to(gpu, torch.bfloat16).eval()
    keep_blocks_(net[0], 0.05)
    x = torch.randn(4096, 4096, device=gpu, dtype=torch.bfloat16)
    dense = copy.deepcopy(net)
    report = compress_(net, x, cache=False)
    assert [row.chosen for row in report.layers] == ["block", "dense"], str(report)
    assert report.speedup > 1.0
    with torch.inference_mode():
        want, got = dense(x).float(), net(x).float()
    assert (want - got).norm() / want.norm() < 1e-2


def test_random_zeros_stay_dense(gpu):
    layer = nn.Sequential(nn.Linear(512, 512)).to(gpu, torch.float16).eval()
    with torch.no_grad():
        layer[0].weight.mul_(torch.rand_like(layer[0].weight) < 0.3)
    report = compress_(layer, torch.randn(512, 512, device=gpu, dtype=torch.float16), cache=False)
    assert report.layers[0].chosen == "dense" and report.speedup == 1.0
