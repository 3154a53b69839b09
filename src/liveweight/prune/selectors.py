"""Which layers: selectors by name, glob, regular expression and module type."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import UninitializedParameter

from liveweight._check import near_misses

Selector = str | type


def layer_kind(module: nn.Module) -> str | None:
    """Return "linear" or "conv" for what can be pruned, None for anything else."""
    if isinstance(module, nn.Linear):
        return "linear"
    return "conv" if isinstance(module, nn.Conv2d) else None


def _as_list(argument: str, selectors: Selector | Iterable[Selector] | None) -> list[Selector]:
    if selectors is None:
        return []
    if isinstance(selectors, (str, type)):
        return [selectors]
    selectors = list(selectors)
    for selector in selectors:
        if not isinstance(selector, (str, type)):
            raise TypeError(
                f"{argument}: a selector is a name, a glob, 're:...' or a module type, "
                f"got {type(selector).__name__}"
            )
    return selectors


def _matches(selector: Selector, name: str, module: nn.Module) -> bool:
    if isinstance(selector, type):
        return isinstance(module, selector)
    if selector.startswith("re:"):
        return re.fullmatch(selector[3:], name) is not None
    if any(c in selector for c in "*?["):
        return fnmatch.fnmatchcase(name, selector)
    return name == selector or name.startswith(selector + ".")


def _select(argument: str, selector: Selector, modules: dict[str, nn.Module]) -> set[str]:
    try:
        found = {n for n, m in modules.items() if n and _matches(selector, n, m)}
    except re.error as error:
        raise ValueError(f"{argument}: {selector!r} is no regular expression: {error}") from error
    if found:
        return found
    if isinstance(selector, type):
        kinds = sorted({type(m).__name__ for n, m in modules.items() if n})
        hint = near_misses(selector.__name__, kinds)
    else:
        hint = near_misses(selector.removeprefix("re:"), [n for n in modules if n])
    shown = selector.__name__ if isinstance(selector, type) else repr(selector)
    raise ValueError(f"{argument}: selector {shown} matches nothing; {hint}")


def choose_layers(
    model: nn.Module,
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
) -> tuple[dict[str, nn.Module], dict[str, str], list[str]]:
    """Return the layers to prune, the prunable layers left alone with the reason, and notes.

    A selector is an exact name (of a layer, or of a module that holds layers), a glob, "re:" and a
    regular expression for the whole name, or a module type. Raises ValueError where a selector
    matches nothing (near misses are listed), TypeError where it is none of these.
    """
    modules = dict(model.named_modules())
    ignored = set().union(*[_select("ignore", s, modules) for s in _as_list("ignore", ignore)])
    wanted = set(modules)
    if layers is not None:
        wanted = set()
        for selector in _as_list("layers", layers):
            found = _select("layers", selector, modules)
            if not any(layer_kind(modules[n]) for n in found):
                kinds = ", ".join(sorted({type(modules[n]).__name__ for n in found}))
                raise ValueError(
                    f"layers: {selector!r} selects only {kinds}; Linear and Conv2d can be pruned"
                )
            wanted |= found
    chosen, left = {}, {}
    owners = _weight_owners(model)
    for name, module in modules.items():
        if layer_kind(module) is None:
            continue
        reason = "ignored" if name in ignored else "not selected" if name not in wanted else ""
        reason = reason or _unfit(name, module, owners)
        if reason:
            left[name] = reason
        else:
            chosen[name] = module
    return chosen, left, _unsupported(modules)


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _unfit(name: str, module: nn.Module, owners: dict[int, list[str]]) -> str:
    """Return why a Linear or Conv2d cannot be pruned, "" where it can."""
    weight = module._parameters.get("weight_orig", module._parameters.get("weight"))
    if weight is None:
        return "its weight is computed from other parameters (parametrization)"
    if isinstance(weight, UninitializedParameter):
        return "its weight has no shape before the first forward pass"
    if weight.numel() == 0:
        return f"it has no inputs or no outputs: weight {list(weight.shape)}"
    others = [o for o in owners[id(weight)] if o != name]
    return f"it shares its weight with '{others[0]}'" if others else ""


def _unsupported(modules: dict[str, nn.Module]) -> list[str]:
    notes = []
    for name, module in modules.items():
        norm = isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm))
        if layer_kind(module) is not None or norm:
            continue
        own = [p for p in module._parameters.values() if p is not None]
        if any(nn.parameter.is_lazy(p) or p.dim() > 1 for p in own):
            notes.append(f"'{name}' ({type(module).__name__}) is not supported: left alone")
    return notes
