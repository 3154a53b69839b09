"""Which of our modules stands in a layer's place: sparse, packed dense, or several by batch."""

from __future__ import annotations

from torch import nn

from liveweight.compress import packing, swap
from liveweight.nn import ByBatch

# What a report and a checkpoint call a layer that chooses by batch size.
BY_BATCH = "by batch"


def is_ours(module: nn.Module) -> bool:
    """True for every module that compress_ puts in a layer's place."""
    return swap.is_sparse(module) or packing.is_packed(module) or isinstance(module, ByBatch)


def dense_type(module: nn.Module) -> type | None:
    """Return nn.Linear or nn.Conv2d for these and for ours, None for any other module."""
    if isinstance(module, ByBatch):
        return dense_type(module.choices[0])
    for kind in (nn.Linear, nn.Conv2d):
        if isinstance(module, kind) or swap.dense_type(module) is kind:
            return kind
    return None


def format_of(module: nn.Module) -> str:
    """Return the name that a report gives to one of our modules."""
    if isinstance(module, ByBatch):
        return BY_BATCH
    return packing.label_of(module) if packing.is_packed(module) else swap.format_name(module)


def inside_by_batch(model: nn.Module) -> set[str]:
    """Return the names of modules that are only one of several forms of a layer."""
    owners = [n for n, m in model.named_modules() if isinstance(m, ByBatch)]
    prefixes = tuple(f"{n}.choices" if n else "choices" for n in owners)
    names = (name for name, _ in model.named_modules(remove_duplicate=False))
    return {n for n in names if n.startswith(prefixes)} if prefixes else set()
