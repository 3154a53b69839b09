"""The one place that knows how dense layers are packed for oneDNN and read back."""

from __future__ import annotations

import torch
from torch import nn

from liveweight import nn as our_nn
from liveweight.nn.packed_module import PackedModule, can_pack

# What a report calls a dense layer that computes with a packed weight, and one that computes as
# ever but has taken in what follows it.
LABEL = "dense, packed"
JOINED = "dense, joined"

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
    dense: nn.Module,
    label: str = LABEL,
    *,
    activation: str | None = None,
    parts: tuple[str, ...] = (),
) -> nn.Module:
    """Return the module of a Linear or Conv2d for LABEL or JOINED, as its from_dense makes it."""
    kind = _PACKED[type(dense)]
    return kind.from_dense(dense, activation=activation, packs=label == LABEL, parts=parts)


def label_of(module: nn.Module) -> str:
    """Return LABEL or JOINED."""
    return LABEL if module.packs else JOINED
