"""A short calibration of this machine: some calls of each format, well under a second in all."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from liveweight.compress import packing, swap
from liveweight.compress.cost_model import CostModel, Speed, speed_of
from liveweight.compress.work import work_of

# (rows or samples, side of the plane, density) of the layers that are timed.
_LINEAR = ((1, 1, 0.1), (8, 1, 0.1), (32, 1, 0.1), (32, 1, 0.5), (256, 1, 0.1))
_CONV = ((1, 16, 0.1), (1, 16, 0.5), (1, 32, 0.1), (1, 4, 0.1), (16, 16, 0.1), (16, 4, 0.1))
_FEATURES, _CHANNELS = 512, 64
_TINY = 8  # sides of a layer whose time is nearly all overhead
_CALLS, _LIMIT_S = 9, 0.01


def calibrated() -> CostModel:
    """Return a cost model that times this machine's CPU as it is asked."""
    return CostModel(calibrate, bandwidth)


def calibrate(name: str, kind: str) -> Speed:
    """Time a format ("dense": plain PyTorch) on one kind of layer; return its Speed."""
    rng_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        overhead = _time(*_example(name, kind, 1, 2, 0.5, tiny=True)[1:])
        points = []
        for rows, side, density in _LINEAR if kind == "linear" else _CONV:
            if name.startswith("dense"):
                density = 1.0
            layer, module, x = _example(name, kind, rows, side, density)
            work = work_of(layer, name, x)
            if work.flops:
                points.append((work.features, speed_of(work, _time(module, x), overhead)))
        return Speed(overhead, points)
    finally:
        torch.random.set_rng_state(rng_state)


def bandwidth() -> float:
    """Return bytes per microsecond of a ReLU over some MB, read and written together."""
    x = torch.ones(1 << 20)
    return 8.0 * x.numel() / max(_time(torch.relu, x), 1e-3)


@torch.no_grad()
def _example(
    name: str, kind: str, rows: int, side: int, density: float, tiny: bool = False
) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return (dense layer, the module to time, its input)."""
    if kind == "linear":
        size = _TINY if tiny else _FEATURES
        layer, x = nn.Linear(size, size), torch.randn(rows, size)
    else:
        size, kernel = _TINY if tiny else _CHANNELS, 1 if kind == "pointwise" else 3
        layer = nn.Conv2d(size, size, kernel, padding=kernel // 2)
        x = torch.randn(rows, size, side, side)
    keep = torch.rand(_pattern_shape(layer.weight, name)) < density
    keep.view(-1)[0] = True
    layer.weight.mul_(_spread(keep, layer.weight.shape))
    layer.requires_grad_(False)
    if name == "dense":
        return layer, layer, x
    if name == packing.LABEL:
        return layer, packing.make_packed(layer), x
    return layer, swap.make_sparse(layer, name), x


def _pattern_shape(weight: Tensor, name: str) -> tuple[int, ...]:
    if name == "kernelwise":
        return (*weight.shape[:2], 1, 1)
    if name == "block":
        return tuple(-(-size // 16) for size in weight.shape)
    if name == "nm":
        return (weight.shape[0], weight.shape[1] // 4)
    return tuple(weight.shape)


def _spread(keep: Tensor, shape: torch.Size) -> Tensor:
    """Return a pattern of units as a pattern of weights; n:m gets two of four where a unit is."""
    if keep.dim() == 2 and 4 * keep.shape[1] == shape[1] and keep.shape[0] == shape[0]:
        return (keep[..., None] & torch.tensor([True, False, False, True])).flatten(1)
    for axis in (0, 1):
        if keep.shape[axis] not in (1, shape[axis]):
            keep = keep.repeat_interleave(16, axis).narrow(axis, 0, shape[axis])
    return keep


def _time(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the best of a few calls in microseconds: other work only ever adds time."""
    best, start = float("inf"), time.perf_counter()
    with torch.inference_mode():
        call(x)
        for _ in range(_CALLS):
            begin = time.perf_counter()
            call(x)
            end = time.perf_counter()
            best = min(best, end - begin)
            if end - start > _LIMIT_S:
                break
    return best * 1e6
