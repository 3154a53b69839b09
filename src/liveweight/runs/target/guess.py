"""Where a search for a latency starts: the sparsity at which a cost model expects the target."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from liveweight.compress import chains
from liveweight.compress.calibrate import calibrated
from liveweight.compress.cost_model import CostModel
from liveweight.compress.inputs import ExampleInputs, device_of

_FORMATS = {"linear": ("dense", "unstructured"), "conv": ("dense", "kernelwise", "unstructured")}
_STEPS = 7


def expected_sparsity(
    model: nn.Module,
    inputs: ExampleInputs,
    share: float,
    granularity: dict[str, str],
    *,
    highest: float,
    cost_model: CostModel | None = None,
) -> float | None:
    """Return the sparsity at which Linear and Conv2d layers take `share` of their dense time.

    granularity  "weight", "kernel" or "neuron" by kind of layer ("linear", "conv"); units leave
                 (1 - sparsity)^2 of the work; others are predicted by a cost model that calibrates
                 itself on this CPU (about a second), on random zeros
    returns      None where nothing is predicted: on a GPU, for other structures, for no layers
    """
    kinds = set(granularity.values())
    if kinds == {"neuron"}:
        return min(1.0 - math.sqrt(share), highest)
    if device_of(inputs).type != "cpu" or not kinds <= {"weight", "kernel"}:
        return None
    layers = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    seen = chains.sample(model, inputs, set(layers))[0].inputs
    pairs = [(layer, seen[name][0]) for name, layer in layers.items() if seen.get(name)]
    if not pairs:
        return None
    costs = cost_model or calibrated()
    dense = sum(costs.predict(layer, "dense", x) for layer, x in pairs)
    low, high = 0.0, highest
    for _ in range(_STEPS):
        middle = (low + high) / 2
        expected = sum(_expect(costs, layer, x, middle, granularity) for layer, x in pairs)
        low, high = (middle, high) if expected > share * dense else (low, middle)
    return high


def _expect(
    costs: CostModel, layer: nn.Module, x: Tensor, sparsity: float, granularity: dict[str, str]
) -> float:
    kind = "linear" if isinstance(layer, nn.Linear) else "conv"
    thin = _thinned(layer, sparsity, whole_kernels=granularity[kind] == "kernel")
    return min(costs.predict(thin, name, x) for name in _FORMATS[kind])


@torch.no_grad()
def _thinned(layer: nn.Module, sparsity: float, whole_kernels: bool) -> nn.Module:
    """Return a copy of a layer with a share of zeros where chance puts them."""
    thin = copy.deepcopy(layer)
    shape = thin.weight.shape[:2] if whole_kernels else thin.weight.shape
    dice = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    kept = (dice >= sparsity).view(*shape, *[1] * (thin.weight.dim() - len(shape)))
    thin.weight.copy_(kept.expand_as(thin.weight))
    return thin
