"""Which importances score whole units only, and which units must stay."""

from __future__ import annotations

from torch import nn

from liveweight._graph import GraphError, trace
from liveweight.prune.importances import Importance, Target


def check_units(importance: Importance, granularity: str | None) -> str | None:
    """Return the granularity to go by; raise ValueError where the importance scores units only."""
    units = {importance.default_granularity(kind) for kind in ("conv", "linear")} == {"neuron"}
    if units and granularity not in (None, "neuron"):
        raise ValueError(
            f"importance {importance.name!r} scores whole units: granularity must be 'neuron', got "
            f"{granularity!r}"
        )
    return "neuron" if units else granularity


def output_layers(model: nn.Module, targets: dict[str, Target]) -> dict[str, str]:
    """Return the layers whose units must stay -> why; raise ValueError for a model not traced."""
    try:
        graph = trace(model)
    except GraphError as error:
        raise ValueError(
            "granularity 'neuron' must know which units are the model's output, and the model "
            f"cannot be traced: {error}"
        ) from error
    found = {}
    for name in targets:
        layer = graph.layers.get(name)
        if layer is None:
            found[name] = graph.skipped.get(name, "what reads its units is not known")
        elif layer.is_output:
            found[name] = "its units are the model's output"
    return found
