"""Bringing the channels of a space into another order: every tensor that counts them, in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liveweight._graph_spaces import Space

_PLAIN = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
_TENSORS = {"weight", "bias", "weight_mask", "bias_mask"}
_TENSORS |= {"running_mean", "running_var", "num_batches_tracked"}


def shared_parameters(model: nn.Module) -> set[int]:
    """Return the ids of parameters that are held in more than one place."""
    places: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                places[id(parameter)] = places.get(id(parameter), 0) + 1
    return {key for key, count in places.items() if count > 1}


def why_fixed(model: nn.Module, space: Space, shared: set[int]) -> str:
    """Return why the channels of a space must stay in their order, "" where they need not."""
    if space.fixed or space.channels < 2:
        return space.fixed or "it has one channel"
    for name in [*space.writers, *space.vectors, *(f.name for f in space.readers)]:
        module = model.get_submodule(name)
        if reason := _why_not_plain(module, shared):
            return f"{name}: {reason}"
    return ""


def _why_not_plain(module: nn.Module, shared: set[int]) -> str:
    if hasattr(module, "parametrizations"):
        return "it carries parametrizations"
    if type(module) not in _PLAIN and getattr(module, "channelwise", False) is not True:
        return f"{type(module).__name__} is not supported"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it carries hooks, which would see another order"
    if any(id(p) in shared for p in module._parameters.values()):
        return "it shares a parameter with another module"
    if type(module) in _PLAIN:
        for name in [*module._parameters, *module._buffers]:
            if name not in _TENSORS:
                return f"it carries another tensor, {name}"
    return ""


def _take_(module: nn.Module, dim: int, index: Tensor, size: int) -> None:
    """Reorder one dimension of every own tensor that has `size` entries there, gradients too."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is None or tensor.dim() <= dim or tensor.shape[dim] != size:
            continue
        at = index.to(tensor.device)
        tensor.copy_(tensor.detach().index_select(dim, at))
        if tensor.grad is not None:
            tensor.grad.copy_(tensor.grad.index_select(dim, at))


def columns(order: Tensor, fan: int) -> Tensor:
    """Return the order of the input features of a reader: fan of them belong to one channel."""
    return (order[:, None] * fan + torch.arange(fan, device=order.device)).flatten()


@torch.no_grad()
def permute_(model: nn.Module, space: Space, order: Tensor) -> None:
    """Put channel order[i] at place i in everything that a space couples; Parameters stay objects.

    order   int64 [channels], a permutation
    """
    for name in (*space.writers, *space.vectors):
        _take_(model.get_submodule(name), 0, order, space.channels)
    for reader in space.readers:
        module = model.get_submodule(reader.name)
        _take_(module, 1, columns(order, reader.fan), space.channels * reader.fan)
