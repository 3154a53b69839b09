"""Hyper and hypo neurons: units that are mostly or barely active; finding and removing them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liveweight.prune.batches import Batches
from liveweight.prune.importances import Target
from liveweight.prune.passes import ALL_KINDS
from liveweight.prune.plan import Plan
from liveweight.prune.report import format_table
from liveweight.prune.selectors import Selector, choose_layers, layer_kind
from liveweight.prune.snapshot import restoring
from liveweight.prune.unit_criteria import FiringRate, watched_layers


@dataclass
class Salience:
    """Units of one layer: firing rate float64 [out], hypo and hyper bool [out]."""

    rate: Tensor
    hypo: Tensor
    hyper: Tensor


class HyperHypo(dict[str, Salience]):
    """Salience by layer name; prints as a table."""

    def units(self, which: str = "both") -> dict[str, Tensor]:
        """Return the hypo units, the hyper ones, or both, by layer name: bool [out].

        Raises ValueError for another word.
        """
        if which not in ("hypo", "hyper", "both"):
            raise ValueError(f"which must be 'hypo', 'hyper' or 'both', got {which!r}")
        pick = {"hypo": lambda s: s.hypo, "hyper": lambda s: s.hyper}
        take = pick.get(which, lambda s: s.hypo | s.hyper)
        return {name: take(salience) for name, salience in self.items()}

    def table(self) -> str:
        """Return one line per layer."""
        rows = [
            [name, f"{s.rate.numel():,}", f"{int(s.hypo.sum()):,}", f"{int(s.hyper.sum()):,}",
             f"{float(s.rate.mean()):.3f}"]
            for name, s in self.items()
        ]  # fmt: skip
        return format_table(["layer", "units", "hypo", "hyper", "mean rate"], rows, left=1)

    def __str__(self) -> str:
        return self.table()


def find_hyper_hypo(
    model: nn.Module,
    data: Iterable,
    *,
    low: float = 0.05,
    high: float = 0.95,
    percentile: bool = False,
    eps: float | None = None,
    quantile: float = 0.1,
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
    steps: int | None = None,
) -> HyperHypo:
    """Find the units that are barely (hypo) and mostly (hyper) active after their activation.

        f_j = fraction of samples with |h_j| > eps;    hypo: f_j <= low    hyper: f_j >= high

    percentile     low and high are quantiles of each layer's own rates instead
    eps, quantile  as FiringRate takes them
    layers         default: all whose units are not the model's output

    Our definition: the paper that names them (Mitra, Franco, arXiv 2001.01755) gives no public one.
    Raises ValueError for low and high outside 0 <= low <= high <= 1, a model that cannot be traced,
    and data as `score` does.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"expected 0 <= low <= high <= 1, got low={low}, high={high}")
    importance = FiringRate(eps, quantile)
    chosen, _, _ = choose_layers(model, layers, ignore)
    facts = watched_layers(importance.name, model, chosen)
    targets = {
        name: Target(name, module, layer_kind(module), "kernel")
        for name, module in chosen.items()
        if layers is not None or not facts[name].is_output
    }
    found = HyperHypo()
    for name, rate in importance.collect(model, targets, Batches(data, steps)).items():
        limits = (low, high)
        if percentile:
            ends = torch.tensor(limits, dtype=rate.dtype, device=rate.device)
            limits = rate.quantile(ends).tolist()
        found[name] = Salience(rate, rate <= limits[0], rate >= limits[1])
    return found


def remove_units_(model: nn.Module, units: Mapping[str, Tensor]) -> int:
    """Mask whole units: their weights, biases and BatchNorm entries become zero; return how many.

    units   by layer name, bool [out], True goes
    Raises ValueError for layers that are not known, wrong shapes, and units of the model's output,
    TypeError for masks that are not bool; the model is then as it was.
    """
    layers = watched_layers("remove_units_", model, units)
    targets = {}
    for name, gone in units.items():
        module = layers[name].module
        if not isinstance(gone, Tensor) or gone.dtype != torch.bool:
            raise TypeError(f"remove_units_: units of '{name}' must be a bool tensor")
        if tuple(gone.shape) != (layers[name].channels,):
            raise ValueError(
                f"remove_units_: '{name}' has {layers[name].channels} units, got a mask of shape "
                f"{list(gone.shape)}"
            )
        if layers[name].is_output and bool(gone.any()):
            raise ValueError(f"remove_units_: the units of '{name}' are the model's output")
        targets[name] = Target(name, module, layers[name].kind, "kernel")
    with restoring(model):
        plan = Plan(model, targets)
        for name, gone in units.items():
            plan.drop_units(name, gone.to(layers[name].module.weight.device), layers[name].norm)
        plan.apply_(ALL_KINDS)
    return sum(int(gone.sum()) for gone in units.values())
