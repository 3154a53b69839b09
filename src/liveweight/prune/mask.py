"""Masks as buffers: `weight_mask` beside the parameter `weight`, `bias_mask` beside `bias`.

A mask is a persistent bool buffer, so state_dict, deepcopy, pickle and .to() carry it. The pruned
entries of the parameter are zeros; nothing is computed in forward. Masks of torch.nn.utils.prune
(`weight_orig`, a float mask and a hook) are read, and folded into this form by verbs that write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from liveweight._check import near_misses

_SUFFIX = "_mask"


def module_masks(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yield (parameter name, parameter, mask) of a module's own masks, of either kind."""
    for name, mask in module._buffers.items():
        parameter_name = name.removesuffix(_SUFFIX)
        if mask is None or parameter_name == name:
            continue
        parameter = module._parameters.get(parameter_name)
        if parameter is None:
            parameter = module._parameters.get(f"{parameter_name}_orig")
        if parameter is not None and parameter.shape == mask.shape:
            yield parameter_name, parameter, mask


def own_mask(module: nn.Module, parameter_name: str) -> Tensor | None:
    """Return the bool mask of one parameter, None where it has none."""
    for name, _, mask in module_masks(module):
        if name == parameter_name:
            return mask.bool()
    return None


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Return {parameter name: bool mask}, True = kept, for every masked parameter.

    Masks of torch.nn.utils.prune are included, under the name without `_orig`.
    """
    found = {}
    for prefix, module in model.named_modules():
        for name, _, mask in module_masks(module):
            found[f"{prefix}.{name}" if prefix else name] = mask.bool()
    return found


def set_mask_(module: nn.Module, parameter_name: str, mask: Tensor) -> None:
    """Attach or replace one mask, and write zeros where it is False."""
    parameter = module._parameters[parameter_name]
    mask = mask.to(device=parameter.device, dtype=torch.bool)
    buffer = module._buffers.get(parameter_name + _SUFFIX)
    if buffer is not None and buffer.dtype == torch.bool and buffer.device == mask.device:
        buffer.copy_(mask)
    else:
        module.register_buffer(parameter_name + _SUFFIX, mask.clone())
    with torch.no_grad():
        parameter.masked_fill_(~mask, 0)


def absorb_(module: nn.Module) -> None:
    """Fold torch.nn.utils.prune masks of a module into ours; the Parameter objects stay."""
    found = [
        (key, hook._tensor_name)
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, BasePruningMethod)
    ]
    order = [n.removesuffix("_orig") if n.removesuffix("_orig") in dict(found).values() else n
             for n in module._parameters]  # fmt: skip
    for key, name in found:
        del module._forward_pre_hooks[key]
        parameter = module._parameters.pop(f"{name}_orig")
        mask = module._buffers.pop(f"{name}{_SUFFIX}")
        module.__dict__.pop(name, None)
        module._parameters[name] = parameter
        set_mask_(module, name, mask != 0)
    if found:  # weight before bias, as before torch's hook moved them
        wanted = [n for n in ("weight", "bias") if n in order]
        wanted += [n for n in order if n not in wanted]
        parameters = dict(module._parameters)
        module._parameters.clear()
        module._parameters.update({n: parameters[n] for n in wanted})


def _locate(model: nn.Module, given: Mapping[str, Tensor]) -> list[tuple[nn.Module, str, Tensor]]:
    """Check every name, dtype and shape before anything is written."""
    modules = dict(model.named_modules())
    known = [n.removesuffix("_orig") for n, _ in model.named_parameters()]
    places = []
    for full, mask in given.items():
        prefix, _, name = full.rpartition(".")
        module = modules.get(prefix)
        own = module._parameters if module is not None else {}
        parameter = own.get(name)
        parameter = own.get(f"{name}_orig") if parameter is None else parameter
        if parameter is None:
            raise ValueError(f"masks: no parameter {full!r}; {near_misses(full, known)}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"masks: {full!r} must be a bool tensor, got {got}")
        if mask.shape != parameter.shape:
            raise ValueError(
                f"masks: {full!r} has shape {list(mask.shape)}, "
                f"the parameter has {list(parameter.shape)}"
            )
        places.append((module, name, mask))
    return places


def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Attach masks by parameter name and zero what they drop; they replace masks that are there.

    masks   {parameter name: bool, the parameter's shape, True = kept}
    Raises ValueError for an unknown name (near misses) or a wrong shape, TypeError for a mask that
    is no bool tensor; the model is then unchanged.
    """
    for module, name, mask in _locate(model, masks):
        absorb_(module)
        set_mask_(module, name, mask)


def copy_masks_(source: nn.Module, target: nn.Module) -> None:
    """Give target the masks of source: for an averaged copy (EMA) that was made before pruning.

    Either may be wrapped (torch.optim.swa_utils.AveragedModel, DistributedDataParallel). Averages
    of zeros are zeros, so a copy made after pruning carries its masks already and needs no help.
    """
    apply_masks_(unwrap(target), masks(unwrap(source)))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside AveragedModel or (Distributed)DataParallel."""
    wrappers = (
        torch.optim.swa_utils.AveragedModel,
        nn.parallel.DistributedDataParallel,
        nn.DataParallel,
    )
    while isinstance(model, wrappers):
        model = model.module
    return model


def strip_(model: nn.Module) -> None:
    """Make the zeros permanent and remove the masks, those of torch.nn.utils.prune too."""
    for module in model.modules():
        absorb_(module)
        for name, parameter, mask in list(module_masks(module)):
            with torch.no_grad():
                parameter.masked_fill_(~mask.bool(), 0)
            del module._buffers[name + _SUFFIX]
            module._non_persistent_buffers_set.discard(name + _SUFFIX)
