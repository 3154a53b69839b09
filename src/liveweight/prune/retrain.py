"""Between pruning and retraining: rewind parameters, load states, renew BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from liveweight._check import near_misses
from liveweight._graph import GraphError, trace
from liveweight.prune.batches import Batches, evaluating, run
from liveweight.prune.mask import module_masks, set_mask_
from liveweight.prune.residual import attach_shortcut_mask_, can_mask_shortcut
from liveweight.prune.snapshot import restoring


def recalibrate_bn_(model: nn.Module, data: Iterable, steps: int | None = None) -> int:
    """Estimate the running mean and variance of every BatchNorm anew: plain averages over batches.

    Pruning changes what a BatchNorm receives; its stored statistics are then stale. Only BatchNorm
    runs in training mode (dropout stays off), parameters do not change, every module has its own
    mode again afterwards. Returns the number of BatchNorms with running statistics.

    Raises ValueError for empty data or data on another device, and whatever the model raises; the
    statistics are then as they were.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return 0
    batches = Batches(data, steps)
    momenta = [module.momentum for module in norms]
    with restoring(model), evaluating(model):
        try:
            for module in norms:
                module.reset_running_stats()
                module.momentum = None  # cumulative average
                module.train()
            run(model, batches)
        finally:
            for module, momentum in zip(norms, momenta, strict=True):
                module.momentum = momentum
    return len(norms)


def _reapply_masks_(model: nn.Module) -> None:
    with torch.no_grad():
        for module in model.modules():
            for _, parameter, mask in module_masks(module):
                parameter.masked_fill_(~mask.bool(), 0)


def rewind_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load earlier values of all parameters and buffers and keep the present masks.

    state   state_dict of the model before pruning (masks in it are not used), e.g. from before
            training: the lottery-ticket rewind
    Raises ValueError where a name is missing or unknown or a shape differs; the model is then
    unchanged.
    """
    own = dict(model.state_dict())
    masks = {
        f"{prefix}.{name}_mask" if prefix else f"{name}_mask"
        for prefix, module in model.named_modules()
        for name, _, _ in module_masks(module)
    }
    masks |= {name for name in own if name.endswith(".mask")}
    needed = own.keys() - masks
    for name in sorted(needed - state.keys()):
        raise ValueError(f"rewind_: the state lacks {name!r}; {near_misses(name, state)}")
    for name, value in state.items():
        if name not in own and not name.endswith("_mask"):
            raise ValueError(f"rewind_: the model has no {name!r}; {near_misses(name, needed)}")
        if name in needed and value.shape != own[name].shape:
            raise ValueError(
                f"rewind_: {name!r} has shape {list(value.shape)}, "
                f"the model has {list(own[name].shape)}"
            )
    with torch.no_grad():
        for name in needed:
            own[name].copy_(state[name])
    _reapply_masks_(model)


def load_state_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the state_dict of a pruned model into a fresh one of the same class, masks included.

    Raises ValueError where a mask belongs to no parameter or shortcut, and RuntimeError (from
    load_state_dict) where keys or shapes do not fit; the model is then unchanged.
    """
    with restoring(model):
        modules = dict(model.named_modules())
        shortcuts = {}
        for name, value in state.items():
            prefix, _, last = name.rpartition(".")
            if last.endswith("_mask") and name not in model.state_dict():
                module = modules.get(prefix)
                parameter = last.removesuffix("_mask")
                if module is None or module._parameters.get(parameter) is None:
                    raise ValueError(f"load_state_: {name!r} belongs to no parameter of the model")
                module.register_buffer(last, torch.ones_like(module._parameters[parameter]).bool())
            elif last == "mask" and name not in model.state_dict():
                shortcuts[prefix.rpartition(".")[0]] = value.bool()
        _attach_shortcuts_(model, shortcuts)
        model.load_state_dict(state)
        for module in modules.values():
            for name, _, mask in list(module_masks(module)):
                set_mask_(module, name, mask)


def _attach_shortcuts_(model: nn.Module, shortcuts: dict[str, Tensor]) -> None:
    if not shortcuts:
        return
    try:
        blocks = {b.shortcut: b for b in trace(model).residual_blocks if can_mask_shortcut(b)}
    except GraphError as error:
        raise ValueError(f"load_state_: the state masks shortcuts, but {error}") from error
    for name, mask in shortcuts.items():
        if name not in blocks:
            raise ValueError(f"load_state_: {name!r} is no shortcut of a residual block")
        attach_shortcut_mask_(model, blocks[name], mask)
