"""What differs from a dense instance of the model's class, module by module, as JSON."""

from __future__ import annotations

from torch import nn

from liveweight.compress import forms
from liveweight.nn import ByBatch, Residual
from liveweight.nn.shortcut_mask import shortcut_mask

# Sizes that shrinking changes, by module type.
SIZES: dict[type, tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: ("in_channels", "out_channels"),
    nn.BatchNorm1d: ("num_features",),
    nn.BatchNorm2d: ("num_features",),
}
_ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU", "gelu_tanh": "GELU"}
_CONV = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def describe(model: nn.Module) -> dict[str, dict]:
    """Return module name -> its entry, each sparse, packed, absorbed, shrunken or masked."""
    entries: dict[str, dict] = {}
    inside = forms.inside_by_batch(model)
    for name, module in model.named_modules():
        if name in inside:
            continue
        if forms.is_ours(module):
            entries[name] = _joined_entry(name, module)
            for part, kind in absorbed(name, module):
                entries[part] = {"type": "Identity", "was": kind}
        elif isinstance(module, Residual):
            entries[name] = _residual_entry(module)
        elif (mask := shortcut_mask(module)) is not None:
            entry = {"type": "ShortcutMask", "was": type(module[0]).__name__}
            entries[name] = entry | {"channels": mask.mask.numel()}
        elif type(module) in SIZES and hasattr(module, "shrunk_from"):
            entries[name] = _sizes_entry(module, type(module))
    return entries


def _sizes_entry(module: nn.Module, kind: type) -> dict:
    entry = {"type": kind.__name__, "sizes": {n: getattr(module, n) for n in SIZES[kind]}}
    if hasattr(module, "shrunk_from"):
        entry["from"] = dict(module.shrunk_from)
    return entry


def _residual_entry(module: Residual) -> dict:
    entry = {"type": "Residual", "was": type(module._block).__name__}
    entry |= {"branch": list(module.branch), "shortcut": module.shortcut_name}
    return entry | {"activation": module.activation}


def _joined_entry(name: str, module: nn.Module) -> dict:
    kind = forms.dense_type(module)
    entry = _sizes_entry(module, kind)
    entry |= {"type": type(module).__name__, "dense": kind.__name__}
    entry |= {"format": forms.format_of(module), "activation": module.activation}
    entry["bias"] = module.bias is not None
    entry["parts"] = [part for part, _ in absorbed(name, module)]
    if isinstance(module, ByBatch):
        entry["choices"] = [forms.format_of(choice) for choice in module.choices]
        entry["limits"] = list(module.limits)
    blocks = [
        m for m in (module, *getattr(module, "choices", ())) if getattr(m, "format", "") == "block"
    ]
    if blocks:
        entry["block"] = list(blocks[0].pack().block)
    if getattr(module, "batch_last", False):
        entry["batch_last"] = True
    if kind is nn.Conv2d:
        entry["pool"] = getattr(module, "pool", 1)
        entry["layout"] = getattr(module, "layout", None)
        entry["conv"] = conv_attributes(module)
    return entry


def conv_attributes(module: nn.Module) -> dict[str, object]:
    """Return what makes a convolution beside its sizes, as JSON values."""
    values = {name: getattr(module, name) for name in _CONV}
    values["padding"] = _padding(module)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _padding(module: nn.Module) -> str | tuple[int, ...]:
    """Return "same" and "valid" in numbers, as sparse modules hold them; uneven "same" as it is."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return "same" if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    return module.padding


def absorbed(name: str, module: nn.Module) -> list[tuple[str, str]]:
    """Return (dotted name, type) of the modules that were joined into this one.

    parts are names from the model that was compressed; where that model has become part of a
    larger one, the same prefix stands before all of them.
    """
    parts = list(module.parts)
    if not parts:
        return []
    prefix = name[: -len(parts[0])] if name.endswith(parts[0]) else ""
    kinds = [_ACTIVATIONS[module.activation]] if module.activation else []
    kinds += ["MaxPool2d"] if getattr(module, "pool", 1) > 1 else []
    if len(kinds) < len(parts) - 1:
        kinds.insert(0, "BatchNorm2d" if hasattr(module, "kernel_size") else "BatchNorm1d")
    return [(prefix + part, kind) for part, kind in zip(parts[1:], kinds, strict=True)]
