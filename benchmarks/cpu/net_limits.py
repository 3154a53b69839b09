"""What no faster layer could save: a net without the time of its layers, and at the peak."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from liveweight.nn import ByBatch, PackedConv2d, PackedLinear, SparseConv2d, SparseLinear

REST = "all but the layers"
_LAYERS = (ByBatch, SparseLinear, SparseConv2d, PackedLinear, PackedConv2d, nn.Linear, nn.Conv2d)


class Stored(nn.Module):
    """Hands out a layer's output again, so that the layer takes no time."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, x: Tensor) -> Tensor:
        return self.y


def without_layers(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy of the net whose layers hand out what they computed for x before.

    What is left is attention, norms, sums, activations that joined no layer, and Python. Outputs of
    one shape share memory: read from caches, as behind a layer that has just written them, and so
    never slower than in the net.
    """
    rest = copy.deepcopy(model)
    outer = _outer_layers(rest)
    stored: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, args, y, name=name: stored.update({name: y.clone()}))
        for name, layer in outer.items()
    ]
    rest(x)
    for handle in handles:
        handle.remove()
    shared: dict[tuple, Tensor] = {}
    for name, y in stored.items():
        y = shared.setdefault((y.shape, y.stride()), y)
        parent, _, leaf = name.rpartition(".")
        rest.get_submodule(parent)._modules[leaf] = Stored(y)
    return rest


def _outer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers by name, those inside a ByBatch left out."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{owner}.") for owner in found)
        if isinstance(module, _LAYERS) and not inside:
            found[name] = module
    return found


def useful_flops(model: nn.Module, x: Tensor) -> float:
    """Return 2 x weights that are not zero x outputs each adds to, over the layers of a net."""
    total = 0.0

    def note(layer: nn.Module, args: tuple, y: Tensor) -> None:
        nonlocal total
        kept = int(torch.count_nonzero(layer.weight))
        total += 2.0 * kept * y.numel() / layer.weight.shape[0]

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(note) for layer in layers]
    model(x)
    for handle in handles:
        handle.remove()
    return total
