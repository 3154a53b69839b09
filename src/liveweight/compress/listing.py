"""The layers that compress_ looks at: their rows in the report, and why some are left alone."""

from __future__ import annotations

import torch
from torch import nn

from liveweight.compress import chains, edit, forms
from liveweight.compress.report import ChoiceRow


def list_layers(model: nn.Module) -> tuple[list[ChoiceRow], dict[str, ChoiceRow]]:
    """Return the rows of all layers, and by name those of layers that may get candidates."""
    tied = edit.tied_parameters(model)
    paths = edit.paths_by_module(model)
    rows, wanted = [], {}
    inside = forms.inside_by_batch(model)
    for name, module in model.named_modules():
        if name in inside:
            continue
        row = describe(name, module)
        if row is None:
            continue
        rows.append(row)
        if row.chosen == "dense":
            row.reason = why_not(name, module, tied, paths[id(module)])
            if not row.reason:
                wanted[name] = row
    return rows, wanted


def describe(name: str, module: nn.Module) -> ChoiceRow | None:
    """Return the row of a module that has weights, None for any other."""
    ours = forms.is_ours(module)
    weight = module.weight if ours else module._parameters.get("weight")
    if weight is None or weight.dim() < 2:
        return None
    density = float(torch.count_nonzero(weight.detach())) / max(1, weight.numel())
    row = ChoiceRow(name, _kind(module), density)
    if ours:
        row.chosen, row.parts = forms.format_of(module), tuple(module.parts)
        row.reason = f"already {row.chosen}"
    return row


def _kind(module: nn.Module) -> str:
    kind = forms.dense_type(module)
    if kind is None:
        return type(module).__name__
    return "linear" if kind is nn.Linear else "conv"


def why_not(name: str, module: nn.Module, tied: set[int], paths: list[str]) -> str:
    """Say why a module gets no candidates; "" where it does."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"left alone: {type(module).__name__} is not supported"
    if not name:
        return "left alone: the model itself is this layer; put it into a container"
    if len(paths) > 1:
        return f"left alone: the module has several names, {', '.join(paths)}"
    reason = edit.why_not_plain(module, tied)
    if not reason and chains.has_hooks(module):
        reason = "it has hooks, which a replacement would lose"
    return f"left alone: {reason}" if reason else ""
