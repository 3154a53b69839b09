"""The one place that knows how dense layers are packed for oneDNN and read back."""

from __future__ import annotations

import torch
from torch import nn

from liveweight import nn as our_nn
from liveweight.nn.packed_module import PackedModule, can_pack

# What a report calls a dense layer that computes with a packed weight.
LABEL = "dense, packed"

_PACKED: dict[type, type] = {nn.Linear: our_nn.PackedLinear, nn.Conv2d: our_nn.PackedConv2d}


def is_packed(module: nn.Module) -> bool:
    """True for a PackedLinear or PackedConv2d."""
    return isinstance(module, PackedModule)


def dense_type(module: nn.Module) -> type:
    """Return nn.Linear or nn.Conv2d for a packed module."""
    return nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d


def fits(layer: nn.Module, device: torch.device) -> bool:
    """True where a layer can be packed for this device."""
    return type(layer) in _PACKED and device.type == "cpu" and can_pack(layer.weight)


def make_packed(
    dense: nn.Module, *, activation: str | None = None, parts: tuple[str, ...] = ()
) -> nn.Module:
    """Return the packed module of a Linear or Conv2d. Raises what its from_dense raises."""
    return _PACKED[type(dense)].from_dense(dense, activation=activation, parts=parts)
