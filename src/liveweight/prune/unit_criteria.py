"""Firing rate and APoZ: how often a unit is active after its activation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from liveweight._graph import GraphError, Layer, trace
from liveweight.ops.activity_stats import activity_stats_, new_activity_stats
from liveweight.prune.activity import Watch, observe
from liveweight.prune.importances import LayerScore, Target, importances, score_dtype

_ZEROING = ("relu", "relu6")  # exactly zero where the unit does not fire


def spread_units(scores: Tensor, target: Target) -> LayerScore:
    """Return scores of units [out] as equal shares of what a target's scores stand for."""
    shape = target.score_shape
    per_unit = max(1, torch.Size(shape[1:]).numel())
    scores = (scores / per_unit).to(score_dtype(target.module.weight))
    return LayerScore(scores.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous())


def watched_layers(owner: str, model: nn.Module, names: Iterable[str]) -> dict[str, Layer]:
    """Return the data-flow facts of layers; raise ValueError where a layer's are not known."""
    try:
        graph = trace(model)
    except GraphError as error:
        raise ValueError(
            f"importance '{owner}' must know what follows a layer, and the model cannot be traced: "
            f"{error}"
        ) from error
    unknown = [name for name in names if name not in graph.layers]
    if unknown:
        why = graph.skipped.get(unknown[0], "it is not reached")
        raise ValueError(f"importance '{owner}': layer '{unknown[0]}': {why}; ignore it")
    return {name: graph.layers[name] for name in names}


class _Rates:
    """Counts, per unit, how often |h| > eps after the activation."""

    def __init__(self, layer: Layer, eps: float | None, quantile: float) -> None:
        self._layer, self._eps, self._quantile = layer, eps, quantile
        self._stats: Tensor | None = None
        self.seen = 0

    def update(self, x: Tensor) -> None:
        h = x if self._layer.activation_fn is None else self._layer.activation_fn(x)
        linear = self._layer.kind == "linear"
        if not linear and h.dim() == 3:
            h = h.unsqueeze(0)
        units = h.shape[-1 if linear else 1]
        if self._eps is None:
            exact = self._layer.activation in _ZEROING
            self._eps = 0.0 if exact or h.numel() == 0 else _quantile(h, self._quantile)
        if self._stats is None:
            self._stats = new_activity_stats(units, device=h.device)
        h = h if h.dtype in (torch.float32, torch.bfloat16, torch.float16) else h.float()
        activity_stats_(self._stats, h, per="feature" if linear else "channel", eps=self._eps)
        self.seen += h.numel() // units

    def check(self, name: str) -> None:
        if not torch.isfinite(self._stats[0]).all():
            raise ValueError(f"layer '{name}' has NaN or infinite outputs; rates need finite ones")

    @property
    def rate(self) -> Tensor:
        return self._stats[2] / max(self.seen, 1)


def _quantile(h: Tensor, q: float) -> float:
    """Return the q-quantile of |h|, of at most a million evenly spaced entries."""
    flat = h.detach().float().abs().flatten()
    return float(flat[:: 1 + flat.numel() // 1_000_000].quantile(q))


class FiringRate:
    """Score a unit by its firing rate: the fraction of samples with |h| > eps after the activation.

    Of a convolution, samples are all positions of all inputs. Barely active units go first.

    eps        threshold; None: 0 after ReLU, else the quantile of |h| over the layer's units on the
               first batch
    quantile   used where eps is None and the activation is not zero where a unit is silent

    Scores whole units: granularity "neuron". Our definition of what Mitra and Franco call barely
    and mostly active neurons (arXiv 2001.01755, whose formula is not public).
    Raises ValueError for a negative eps, a quantile outside [0, 1], a model whose data flow cannot
    be traced, and outputs that are not finite.
    """

    name = "firing_rate"
    needs_data = True
    cost = "one forward pass, one read of each layer's output"

    def __init__(self, eps: float | None = None, quantile: float = 0.1) -> None:
        if eps is not None and not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be finite and >= 0 or None, got {eps}")
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile must be in [0, 1], got {quantile}")
        self.eps, self.quantile = eps, quantile

    def default_granularity(self, kind: str) -> str:
        return "neuron"

    def observer(self, target: Target) -> None:
        return None

    def collect(
        self, model: nn.Module, targets: Mapping[str, Target], data: Iterable
    ) -> dict[str, Tensor]:
        """Return the rates by layer name: float64 [out]."""
        layers = watched_layers(self.name, model, targets)
        watches = []
        for name, layer in layers.items():
            self._check(layer)
            module = model.get_submodule(layer.norm or name)
            watches.append(Watch(name, module, "output", _Rates(layer, self.eps, self.quantile)))
        called = observe(model, watches, data)
        return {w.name: w.observer.rate for w in watches if w.name in called}

    def _check(self, layer: Layer) -> None:
        """Raise ValueError where a layer's rates would mean nothing."""

    def score(self, target: Target, seen: Tensor) -> LayerScore:
        return spread_units(seen, target)


class Apoz(FiringRate):
    """Score a unit by 1 - APoZ, APoZ the average percentage of zeros after ReLU.

        APoZ_c = fraction of samples and positions with |h_c| <= eps

    eps   0 goes with ReLU only: after other activations nothing is exactly zero

    Scores whole units: granularity "neuron".
    Source: Hu, Peng, Tai, Tang, "Network trimming", arXiv 1607.03250.
    Raises as FiringRate, and ValueError for eps = 0 where a layer is not followed by ReLU.
    """

    name = "apoz"

    def __init__(self, eps: float = 0.0) -> None:
        super().__init__(eps)

    def _check(self, layer: Layer) -> None:
        if self.eps == 0 and layer.activation not in _ZEROING:
            raise ValueError(
                f"importance 'apoz': layer '{layer.name}' is followed by "
                f"{layer.activation or 'no activation'}, which is never exactly zero: give eps > 0 "
                "or take 'firing_rate'"
            )


importances["firing_rate"] = FiringRate
importances["apoz"] = Apoz
