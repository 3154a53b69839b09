"""Neuron merging: a unit that goes hands its outgoing weights to the kept unit most like it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from liveweight._check import near_misses
from liveweight._graph import Graph, Layer, trace
from liveweight.prune.activity import Watch, observe
from liveweight.prune.mask import copy_masks_, own_mask
from liveweight.prune.report import PruneReport
from liveweight.prune.snapshot import restoring
from liveweight.prune.verbs import prune_

SIMILARITIES = ("weights", "activations")


def merge_(
    model: nn.Module,
    data: Iterable | None = None,
    *,
    similarity: str = "weights",
    least: float = 0.0,
    steps: int | None = None,
    **options: object,
) -> PruneReport:
    """Remove whole units as prune_(granularity="neuron") does, and let similar units stand in.

        j = argmax over kept units of cos(v_i, v_j)    W_next[:, j] += s W_next[:, i]

    For each unit i that goes. Exact where unit i is s times unit j, s > 0, and everything between
    the layer and its followers is positively homogeneous (ReLU, pooling).

    similarity  "weights": v is a unit's incoming weights and bias, a BatchNorm behind it folded
                in; s = |v_i| / |v_j|.  "activations": v is a unit's outputs after the activation
                over the data; s = v_i . v_j / |v_j|^2
    least       units whose best cosine is not above it are removed without a stand-in
    options     of prune_: importance, sparsity or alpha, scope, layers, ignore

    returns     prune_'s report; notes say how many units found a stand-in, and which layers cannot
                merge (a shortcut, a grouped convolution or the model's output reads them)

    The weights' form is Kim, Kim, Park, Lee, "Neuron merging: compensating for pruned neurons",
    NeurIPS 2020, with the standard deviation where its program takes the variance.
    Raises as prune_, and ValueError for an unknown similarity, a `least` outside [-1, 1], and
    activations without data; the model is then as it was.
    """
    if similarity not in SIMILARITIES:
        hint = near_misses(str(similarity), SIMILARITIES)
        raise ValueError(f"similarity must be one of {SIMILARITIES}, got {similarity!r}: {hint}")
    if not -1 <= least <= 1:
        raise ValueError(f"least must be in [-1, 1], got {least}")
    if similarity == "activations" and data is None:
        raise ValueError("similarity 'activations' needs data: an iterable of batches")
    for name in ("granularity", "dry_run"):
        if name in options:
            raise ValueError(f"merge_ takes no {name}: it removes whole units")
    if isinstance(data, Iterator):
        data = list(itertools.islice(data, steps))
    twin = copy.deepcopy(model)
    report = prune_(twin, data, granularity="neuron", steps=steps, **options)
    with restoring(model):
        graph = trace(model)
        gone = {name: _gone(model, twin, name) for name in graph.layers}
        gone = {name: units for name, units in gone.items() if units.any()}
        vectors = _vectors(model, graph, gone, data, steps, similarity)
        report.notes += _merge_all(model, graph, gone, vectors, similarity, least)
        copy_masks_(twin, model)
    return report


def _gone(model: nn.Module, twin: nn.Module, name: str) -> Tensor:
    """Return the units that the twin lost and the model still has: bool [out]."""
    before = own_mask(model.get_submodule(name), "weight")
    after = own_mask(twin.get_submodule(name), "weight")
    units = model.get_submodule(name).weight.shape[0]
    if after is None:
        return torch.zeros(units, dtype=torch.bool)
    lost = ~after.flatten(1).any(1)
    return lost if before is None else lost & before.flatten(1).any(1)


def incoming(layer: Layer, model: nn.Module) -> Tensor:
    """Return what a unit computes before its activation: float64 [out, weights + bias]."""
    weight = layer.module.weight.detach().double().flatten(1)
    bias = layer.module.bias
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().double()
    if layer.norm is not None:
        norm = model.get_submodule(layer.norm)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        shift = torch.zeros_like(scale)
        if norm.affine:
            scale, shift = scale * norm.weight.detach().double(), norm.bias.detach().double()
        bias = shift + scale * (bias - norm.running_mean.double())
        weight = weight * scale.unsqueeze(1)
    return torch.cat([weight, bias.unsqueeze(1)], 1)


class _Products:
    """Sums products of all pairs of a layer's units after the activation: float64 [out, out]."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self.gram: Tensor | None = None

    def update(self, x: Tensor) -> None:
        h = x if self._layer.activation_fn is None else self._layer.activation_fn(x)
        h = h.detach().double()
        rows = h.movedim(-1 if self._layer.kind == "linear" else -3, 0).flatten(1)  # [out, n]
        gram = rows @ rows.t()
        self.gram = gram if self.gram is None else self.gram + gram

    def check(self, name: str) -> None:
        if not torch.isfinite(self.gram).all():
            raise ValueError(f"layer '{name}' has NaN or infinite outputs")


def _vectors(
    model: nn.Module,
    graph: Graph,
    gone: dict[str, Tensor],
    data: Iterable | None,
    steps: int | None,
    similarity: str,
) -> dict[str, Tensor]:
    """Return the products of all pairs of units of the layers that lose some: [out, out]."""
    layers = {name: graph.layers[name] for name in gone}
    if similarity == "weights":
        found = {name: incoming(layer, model) for name, layer in layers.items()}
        return {name: v @ v.t() for name, v in found.items()}
    watches = []
    for name, layer in layers.items():
        module = model.get_submodule(layer.norm or name)
        watches.append(Watch(name, module, "output", _Products(layer)))
    if watches:
        observe(model, watches, itertools.islice(iter(data), steps))
    return {watch.name: watch.observer.gram for watch in watches}


def why_not_merged(model: nn.Module, layer: Layer) -> str:
    """Return why the outgoing weights of a layer cannot be merged, "" where they can."""
    if layer.is_output or not layer.closed or not layer.followers:
        return "not everything that reads it is a known layer"
    if layer.feeds:
        return "a shortcut reads it"
    for follower in layer.followers:
        if getattr(model.get_submodule(follower.name), "groups", 1) != 1:
            return f"'{follower.name}' is a grouped convolution"
    return ""


@torch.no_grad()
def _merge_all(
    model: nn.Module,
    graph: Graph,
    gone: dict[str, Tensor],
    products: dict[str, Tensor],
    similarity: str,
    least: float,
) -> list[str]:
    notes, merged, total = [], 0, 0
    for name, units in gone.items():
        layer = graph.layers[name]
        total += int(units.sum())
        why = why_not_merged(model, layer)
        if why:
            notes.append(f"'{name}' was cut, not merged: {why}")
            continue
        alive = ~units
        mask = own_mask(layer.module, "weight")
        if mask is not None:
            alive &= mask.flatten(1).any(1)
        pairs = _stand_ins(products[name], units, alive, similarity, least)
        for source, target, scale in pairs:
            for follower in layer.followers:
                _hand_over_(model.get_submodule(follower.name), follower.fan, source, target, scale)
        merged += len(pairs)
    return [*notes, f"{merged} of {total} removed units found a stand-in"]


def _stand_ins(
    products: Tensor, gone: Tensor, alive: Tensor, similarity: str, least: float
) -> list[tuple[int, int, float]]:
    """Return (unit, its stand-in, scale) for the units that have one above `least`."""
    norms = products.diagonal().clamp_min(0).sqrt()
    both = norms.unsqueeze(1) * norms
    cosine = torch.where(both > 0, products / both.clamp_min(1e-300), -2.0)
    cosine[:, ~alive] = -2.0
    found = []
    for unit in gone.nonzero()[:, 0].tolist():
        best = int(cosine[unit].argmax())
        if cosine[unit, best] <= least:
            continue
        ratio = norms[unit] / norms[best]
        scale = ratio if similarity == "weights" else ratio * cosine[unit, best]
        found.append((unit, best, float(scale)))
    return found


def _hand_over_(module: nn.Module, fan: int, source: int, target: int, scale: float) -> None:
    """Add scale times the weights that read unit `source` to those that read unit `target`."""
    weight, mask = module.weight, own_mask(module, "weight")
    take, give = slice(source * fan, (source + 1) * fan), slice(target * fan, (target + 1) * fan)
    add = scale * weight[:, take]
    weight[:, give] += add if mask is None else add * mask[:, give]
