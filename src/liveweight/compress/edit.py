"""Changing a model in place so that a failure leaves it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Give every module its parameters, buffers, children and attributes back on an error.

    Tensors are not copied: inside the block they are to be replaced, never written into.
    """
    saved = [(module, _shallow_state(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, state in saved:
            module.__dict__.clear()
            module.__dict__.update(state)
        raise


def _shallow_state(module: nn.Module) -> dict[str, object]:
    state = dict(module.__dict__)
    for name in _CONTAINERS:
        state[name] = state[name].copy()
    return state


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by a new one that keeps its requires_grad."""
    old = module._parameters[name]
    needs_grad = old.requires_grad if old is not None else module.weight.requires_grad
    module._parameters[name] = nn.Parameter(value.detach(), requires_grad=needs_grad)


def take_(module: nn.Module, names: tuple[str, ...], dim: int, index: Tensor) -> None:
    """Keep the given positions of one dimension in the named parameters and buffers that exist."""
    for name in names:
        if module._parameters.get(name) is not None:
            set_parameter(module, name, module._parameters[name].index_select(dim, index))
        elif module._buffers.get(name) is not None:
            module._buffers[name] = module._buffers[name].index_select(dim, index)


def remember_shape_(module: nn.Module, names: tuple[str, ...]) -> None:
    """Note the sizes a module had before it was first shrunken, for checkpoints: shrunk_from."""
    if not hasattr(module, "shrunk_from"):
        module.shrunk_from = {name: getattr(module, name) for name in names}
        if hasattr(module, "bias"):
            module.shrunk_from["bias"] = module.bias is not None


def replace_module_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one with this dotted name."""
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = new


def paths_by_module(model: nn.Module) -> dict[int, list[str]]:
    """Return id(module) -> every dotted name it is registered under."""
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name)
    return paths


def tied_parameters(model: nn.Module) -> set[int]:
    """Return the ids of parameters that more than one module (or name) holds."""
    owners: dict[int, set[tuple[int, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add((id(module), name))
    return {key for key, held in owners.items() if len(held) > 1}


def why_not_plain(module: nn.Module, tied: set[int]) -> str:
    """Say why a Linear, Conv2d or BatchNorm must keep its tensors; "" where it need not."""
    allowed = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
    if type(module) not in allowed:
        return f"{type(module).__name__} is not supported"
    if hasattr(module, "weight_orig") or hasattr(module, "bias_orig"):
        return "it carries torch.nn.utils.prune masks: make them permanent first (strip_)"
    if hasattr(module, "parametrizations"):
        return "it carries parametrizations"
    known = {"weight", "bias", "weight_mask", "bias_mask"}
    known |= {"running_mean", "running_var", "num_batches_tracked"}
    for name in [*module._parameters, *module._buffers]:
        if name not in known:
            return f"it carries another tensor, {name}"
    if any(id(p) in tied for p in module._parameters.values()):
        return "it shares a parameter with another module"
    return ""


def zeros_of(tensor: Tensor) -> Tensor:
    """Return where a weight is zero."""
    return torch.eq(tensor.detach(), 0)
