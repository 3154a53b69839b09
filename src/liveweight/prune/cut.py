"""Whether anything still gets through a pruned model: a layer's mask knows nothing of the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liveweight._graph import GraphError
from liveweight._graph_spaces import find_spaces
from liveweight.prune.mask import own_mask


def cut_layers(model: nn.Module) -> list[str]:
    """Return the layers that nothing of the model's input reaches any more, in module order.

    All they still read are units that keep no weight on anything that carries the input on; biases
    do not count. Inputs that cannot be followed count as carrying. Where the model cannot be
    traced nothing is known, and the list is empty.
    """
    try:
        spaces = find_spaces(model)
    except GraphError:
        return []
    read = {f.name: (index, f.fan) for index, space in enumerate(spaces) for f in space.readers}
    carrying = [torch.zeros(space.channels, dtype=torch.bool) for space in spaces]
    writers = [(name, index) for index, space in enumerate(spaces) for name in space.writers]
    reached: set[str] = set()
    changed = True
    while changed:  # a sum is fed from several sides, so one pass need not do
        changed = False
        for name, index in writers:
            units = _live_units(model.get_submodule(name), carrying, read.get(name))
            reached |= {name} if units.any() else set()
            changed |= bool((units & ~carrying[index]).any())
            carrying[index] |= units
    cut = {name for name, _ in writers} - reached
    return [name for name, _ in model.named_modules() if name in cut]


def _live_units(
    module: nn.Module, carrying: list[Tensor], source: tuple[int, int] | None
) -> Tensor:
    """Return the units with a kept weight on a carrying input: bool [out], on the CPU."""
    mask = own_mask(module, "weight")
    if mask is None:
        mask = torch.ones(module.weight.shape[:2], dtype=torch.bool)
    connected = (mask.flatten(2).any(2) if mask.dim() > 2 else mask).cpu()
    if source is not None:
        index, fan = source
        connected = connected & carrying[index].repeat_interleave(fan)
    return connected.any(1)
