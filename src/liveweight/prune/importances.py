"""Importances: one score per connection or kernel. The protocol, the registry, and two baselines.

Adding an importance: write a class with the members of `Importance`, then
`register_importance("name", factory)`, where factory() returns an object of it. `lw.prune_`,
`lw.score` and recipes find it by that name. State the formula, the source and what it needs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from liveweight._check import near_misses
from liveweight.prune.activity import Observer

SCORED = ("weight", "kernel")  # what one score stands for
GRANULARITIES = (*SCORED, "block", "vnm", "neuron")  # what is removed together


@dataclass(frozen=True)
class Target:
    """A layer to be scored: kind is "linear" or "conv", granularity "weight" or "kernel"."""

    name: str
    module: nn.Module
    kind: str
    granularity: str

    @property
    def score_shape(self) -> tuple[int, ...]:
        """[out, in] of a Linear; [out, in/groups] or the whole weight's shape of a convolution."""
        shape = tuple(self.module.weight.shape)
        return shape[:2] if self.granularity == "kernel" else shape

    @property
    def entry_size(self) -> int:
        """Weights that one score stands for."""
        entries = torch.Size(self.score_shape).numel()
        return self.module.weight.numel() // entries if entries else 1


def score_dtype(weight: Tensor) -> torch.dtype:
    """float32, or float64 for float64 weights."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@dataclass
class LayerScore:
    """Scores of one layer, all finite and >= 0, comparable between its units.

    weight       float32 or float64 (score_dtype), Target.score_shape
    bias         [out] where the bias competes with the connections under a mass rule, else None
    unit_total   float64 [out] what each unit's scores were divided by, where they were
    """

    weight: Tensor
    bias: Tensor | None = None
    unit_total: Tensor | None = None

    def between_units(self) -> LayerScore:
        """Return the scores as they were before a division by their unit's total.

        A share of its own total says nothing about the unit itself.
        """
        if self.unit_total is None:
            return self
        total = self.unit_total.to(self.weight.dtype)
        weight = self.weight * total.view(-1, *[1] * (self.weight.dim() - 1))
        return LayerScore(weight, None if self.bias is None else self.bias * total)


@runtime_checkable
class Importance(Protocol):
    """What `lw.prune_` and `lw.score` ask of an importance.

    name                       shown in reports
    default_granularity(kind)  "weight", "kernel" or "neuron" for a kind of layer, "linear" or
                               "conv"
    observer(target)           what to collect of the layer's input (a prune.Observer, which sees
                               every input batch), or None where the score needs no data
    score(target, seen)        the scores as a LayerScore; `seen` is the filled observer or None

    Instead of observing inputs, an importance may run the model itself (gradients, dropout):
    collect(model, targets, data)  returns `seen` by layer name; observer is then not asked

    A default_granularity of "neuron" for both kinds says that only whole units can be scored; their
    scores come as equal shares of their connections' (unit_criteria.spread_units).

    Some refit what is kept, to make up for the rest; values change then, in prune_ only:
    refit(target, seen, keep)      the new weight; keep is bool in the weight's shape
    solve(target, seen, alive, sparsity, panels)  (keep, new weight): chooses, too

    Optional attributes, with what holds where they are missing:
    needs_data     True refuses to run without data                       (False)
    needs_labels   True: the data must be batches (input, labels)         (False)
    needs_gradients  True: not under torch.inference_mode                 (False)
    cost           words for `liveweight list importances`                ("a look at the weights")
    ties           "stable" or "authors", the tie rule of the mass rule   ("stable")
    phases         kinds that are scored together, in order; later phases see the pruned weights of
                   the earlier ones                                       ((("conv", "linear"),))
    dead_units     under a mass rule, prune units that are never active   (False)
    residual       under a mass rule, weigh branch against shortcut       (False)
    cleanup        prune units that nothing reads any more                (False)
    """

    name: str

    def default_granularity(self, kind: str) -> str: ...

    def observer(self, target: Target) -> Observer | None: ...

    def score(self, target: Target, seen: Observer | None) -> LayerScore: ...


class Magnitude:
    """Score |w|; a whole kernel scores its Frobenius norm. No data; the bias does not compete."""

    name = "magnitude"

    def default_granularity(self, kind: str) -> str:
        return "weight"

    def observer(self, target: Target) -> None:
        return None

    def score(self, target: Target, seen: Observer | None) -> LayerScore:
        weight = target.module.weight.detach()
        weight = weight.to(score_dtype(weight))
        if target.granularity == "kernel" and weight.dim() == 4:
            return LayerScore(weight.flatten(2).norm(dim=2))
        return LayerScore(weight.abs())


class Random:
    """Score uniform random numbers in [0, 1): the baseline every criterion must beat.

    seed   with the layer's name it decides the scores, so they do not depend on the order of layers
           and repeated calls cut nested masks
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def default_granularity(self, kind: str) -> str:
        return "weight"

    def observer(self, target: Target) -> None:
        return None

    def score(self, target: Target, seen: Observer | None) -> LayerScore:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{target.name}".encode()))
        scores = torch.rand(target.score_shape, generator=generator)
        return LayerScore(scores.to(target.module.weight.device))


importances: dict[str, Callable[[], Importance]] = {"magnitude": Magnitude, "random": Random}


def register_importance(name: str, factory: Callable[[], Importance]) -> None:
    """Make an importance available by name; factory() returns an object after `Importance`.

    Raises ValueError where the name is taken, TypeError where factory cannot be called.
    """
    if name in importances:
        raise ValueError(f"an importance named {name!r} is registered already")
    if not callable(factory):
        raise TypeError(f"factory must be callable, got {type(factory).__name__}")
    importances[name] = factory


def resolve_importance(importance: str | Importance) -> Importance:
    """Return the importance object that a name or an object stands for.

    Raises ValueError for an unknown name (near misses are listed), TypeError for anything else.
    """
    if isinstance(importance, str):
        if importance not in importances:
            raise ValueError(
                f"unknown importance {importance!r}: {near_misses(importance, importances)}"
            )
        return importances[importance]()
    if isinstance(importance, type) or not isinstance(importance, Importance):
        what = importance.__name__ if isinstance(importance, type) else type(importance).__name__
        raise TypeError(f"importance must be a registered name or an Importance object, got {what}")
    return importance
