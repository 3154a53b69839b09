"""Dropout-based neuron damage: what the loss costs, on average, while a unit is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from liveweight._graph import Layer
from liveweight.prune.batches import call
from liveweight.prune.importances import LayerScore, Target, importances
from liveweight.prune.loss import LabelledData, Loss
from liveweight.prune.unit_criteria import spread_units, watched_layers

_ROUND = 32  # masks between two looks at the ranking


class DropoutDamage:
    """Score a unit by how much more the calibration loss is while the unit is dropped.

        damage_j = coefficient of "j dropped" in a least-squares fit of the losses L_r of R masks

    Masks drop units of one layer after its activation, without rescaling, in antithetic pairs. With
    fewer than two masks per unit the fit is mean(L | j dropped) - mean(L | j kept), what it is for
    balanced masks. Scores are damages above the smallest one of all layers.

    keep      probability that a mask keeps a unit
    masks     most masks per layer, even
    cut       share of units to be removed: masks are drawn until two looks, 32 masks apart, agree
              on this set but for `wobble` of it
    loss      loss(output, labels) -> the mean over a batch; default: cross-entropy
    seed      of the masks

    After a call, damage, standard_error and drawn hold [out], [out] and the number of masks by
    layer name. Scores whole units: granularity "neuron". Our definition of what Harang and Sanders
    name (arXiv 2306.10177, whose formula is not public).
    Raises ValueError for numbers out of range, without labels, and where the loss is not finite.
    """

    name = "dropout_damage"
    needs_data = needs_labels = True
    cost = "up to `masks` forward passes per layer"

    def __init__(
        self,
        keep: float = 0.5,
        masks: int = 512,
        cut: float = 0.5,
        wobble: float = 0.02,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("keep", keep), ("cut", cut)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if masks < 2 or masks % 2:
            raise ValueError(f"masks must be an even number of at least 2, got {masks}")
        if not 0 <= wobble < 1:
            raise ValueError(f"wobble must be in [0, 1), got {wobble}")
        self.keep, self.masks, self.cut, self.wobble = keep, masks, cut, wobble
        self.loss, self.seed = loss, seed
        self.damage: dict[str, Tensor] = {}
        self.standard_error: dict[str, Tensor] = {}
        self.drawn: dict[str, int] = {}

    def default_granularity(self, kind: str) -> str:
        return "neuron"

    def observer(self, target: Target) -> None:
        return None

    def collect(
        self, model: nn.Module, targets: Mapping[str, Target], data: Iterable
    ) -> dict[str, Tensor]:
        """Return the damages by layer name, shifted so that the smallest of all is 0."""
        layers = watched_layers(self.name, model, targets)
        batches = list(data)
        found, errors, drawn = {}, {}, {}
        for i, (name, layer) in enumerate(layers.items()):
            run = LabelledData(self.name, model, {}, self.loss)
            module = model.get_submodule(layer.norm or name)
            generator = torch.Generator().manual_seed(self.seed + i)
            lose = _Dropped(layer, module, run, batches)
            found[name], errors[name], drawn[name] = self._measure(lose, generator)
        self.damage, self.standard_error, self.drawn = found, errors, drawn
        least = min(float(damage.min()) for damage in found.values())
        return {name: damage - least for name, damage in found.items()}

    def _measure(
        self, lose: Callable[[Tensor], float], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, int]:
        kept: list[Tensor] = []
        losses: list[float] = []
        weakest: set[int] | None = None
        while len(losses) < self.masks:
            for _ in range(min(_ROUND, self.masks - len(losses)) // 2):
                draw = torch.rand(lose.units, generator=generator)
                for mask in (draw < self.keep, draw >= 1 - self.keep):
                    kept.append(mask)
                    losses.append(lose(mask))
            damage, error = fit_damage(torch.stack(kept), torch.tensor(losses).double())
            count = max(1, round(self.cut * lose.units))
            now = set(damage.argsort()[:count].tolist())
            if weakest is not None and len(now - weakest) <= self.wobble * count:
                break
            weakest = now
        return damage, error, len(losses)

    def score(self, target: Target, seen: Tensor) -> LayerScore:
        return spread_units(seen.to(target.module.weight.device), target)


class _Dropped:
    """The loss over all batches while some units of a layer answer 0 after the activation."""

    def __init__(self, layer: Layer, module: nn.Module, run: LabelledData, batches: list) -> None:
        self._layer, self._module, self._run, self._batches = layer, module, run, batches
        self.units = layer.channels

    @torch.no_grad()
    def __call__(self, keep: Tensor) -> float:
        axis = -1 if self._layer.kind == "linear" else -3
        act = self._layer.activation_fn

        def drop(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            shape = [1] * output.dim()
            shape[axis] = -1
            mask = keep.to(output.device).view(shape)
            # What follows maps 0 to 0, or is told the input that it maps to 0.
            return torch.where(mask, output, _silent(act, output))

        total, samples = 0.0, 0
        handle = self._module.register_forward_hook(drop)
        try:
            for x, labels in self._run.batches(self._batches):
                output, _ = call(self._run.model, x, set())
                total += float(self._run.checked(self._run.loss(output, labels))) * len(x)
                samples += len(x)
        finally:
            handle.remove()
        return total / samples


def _silent(act: Callable | None, output: Tensor) -> Tensor:
    """Return 0 as an input that the activation maps to 0; raise ValueError where it does not."""
    zero = output.new_zeros(())
    if act is not None and bool(act(zero.view(1, 1, 1, 1)).ne(0).any()):
        raise ValueError("importance 'dropout_damage': the activation does not map 0 to 0")
    return zero


def fit_damage(kept: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return (damage, standard error) [units] from masks kept [R, units] bool and losses [R]."""
    dropped = (~kept).double()
    masks, units = dropped.shape
    if masks >= 2 * (units + 1):
        design = torch.cat([dropped, torch.ones(masks, 1, dtype=torch.float64)], 1)
        fit = torch.linalg.pinv(design)  # [units + 1, R]
        coefficients = fit @ losses
        rest = losses - design @ coefficients
        variance = rest.square().sum() / (masks - units - 1)
        return coefficients[:-1], (variance * fit.square().sum(1)[:-1]).sqrt()
    damage, error = [], []
    for column in dropped.t():
        gone, here = losses[column > 0], losses[column == 0]
        if len(gone) < 2 or len(here) < 2:
            damage.append(losses.new_zeros(()))
            error.append(losses.new_tensor(float("inf")))
            continue
        damage.append(gone.mean() - here.mean())
        error.append((gone.var() / len(gone) + here.var() / len(here)).sqrt())
    return torch.stack(damage), torch.stack(error)


importances["dropout_damage"] = DropoutDamage
