"""Counting weights: conv kernels and biases, Linear weights and biases; the rest apart."""

from __future__ import annotations

from torch import nn

from liveweight import prune


def count_weights(model: nn.Module) -> dict:
    """Return kept and total weights of all Linear and Conv layers, and the same with all the rest.

    {"kept", "total"}: conv kernels, conv biases, Linear weights, Linear biases, as pruning papers
    count them (normalisation excluded); {"kept_all", "total_all"}: every parameter, where those
    that cannot be masked count as kept; "rows": the same per layer.
    """
    masks = prune.masks(model)
    rows, counted = [], set()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        row = {"name": name, "kept": 0, "total": 0}
        for key, parameter in module.named_parameters(recurse=False):
            path = f"{name}.{key}" if name else key
            path = path.removesuffix("_orig")  # torch.nn.utils.prune's name of a masked parameter
            mask = masks.get(path)
            row["total"] += parameter.numel()
            row["kept"] += parameter.numel() if mask is None else int(mask.sum())
            counted.add(id(parameter))
        rows.append(row)
    rest = sum(p.numel() for p in model.parameters() if id(p) not in counted)
    kept, total = (sum(row[key] for row in rows) for key in ("kept", "total"))
    return {
        "kept": kept,
        "total": total,
        "kept_all": kept + rest,
        "total_all": total + rest,
        "rows": rows,
    }
