"""Unsupervised adaptation: pseudo-labels where the net is sure, chosen units first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveweight.prune.batches import Batches, call, evaluating, model_devices
from liveweight.prune.keep import keep_masks
from liveweight.prune.loss import Loss, cross_entropy
from liveweight.prune.unit_criteria import watched_layers

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class AdaptReport:
    """What adaptation went through: a row per epoch.

    rows   {"stage", "epoch", "sure": samples with a label, "samples", "loss": mean over them}
    """

    rows: list[dict] = field(default_factory=list)


def adapt_(
    model: nn.Module,
    data: Iterable,
    units: Mapping[str, Tensor] | None = None,
    *,
    epochs: tuple[int, int] | int = (5, 5),
    margin: float = 0.5,
    lr: float = 1e-3,
    loss: Loss | None = None,
    make_optimizer: MakeOptimizer | None = None,
    steps: int | None = None,
) -> AdaptReport:
    """Adapt a classifier to inputs without labels, in place.

        label_n = argmax p_n, used where p_n(1st) - p_n(2nd) > margin, p = softmax of the output

    Labels are given anew before every epoch. With `units`, stage 1 trains only their incoming
    weights and biases and the weights that read them, and stage 2 the whole net (selective
    adaptation); without, everything is trained at once for the sum of the epochs (blind
    adaptation). The net stays in eval mode: BatchNorm and dropout do not move. Masks hold.

    data            batches of inputs (labels beside them are not looked at), taken every epoch, in
                    any order, and held for that long
    units           by layer name, bool [out] (HyperHypo.units)
    epochs          of stage 1 and stage 2
    margin          in [0, 1)
    loss            loss(output, labels) -> the mean over a batch; default: cross-entropy
    make_optimizer  parameters -> optimizer; default: Adam with lr

    Our definition of selective adaptation; the formulas of the paper that proposes it (Mitra,
    Franco, arXiv 2001.01755) are not public.
    Raises ValueError for a margin out of range, unusable epochs, unknown layers or shapes, an
    iterator as data, frozen parameters alone, torch.inference_mode, and outputs or a loss that are
    not finite (the net is then as it was).
    """
    first, second = _check(model, data, epochs, margin)
    batches = Batches(data, steps)
    make = make_optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=lr))
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    gradients = [(p, p.grad) for p in model.parameters()]
    report = AdaptReport()
    run = _Run(model, batches, margin, loss or cross_entropy, make, report)
    try:
        if units is None:
            run.stage(1, first + second, None)
        else:
            run.stage(1, first, touched(model, units))
            run.stage(2, second, None)
    except BaseException:
        model.load_state_dict(before)
        raise
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return report


def _check(model: nn.Module, data: Iterable, epochs: object, margin: float) -> tuple[int, int]:
    if torch.is_inference_mode_enabled():
        raise ValueError("adapt_ needs gradients, which torch.inference_mode rules out")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("adapt_: nothing to train: no parameter requires gradients")
    if iter(data) is data:
        raise ValueError("adapt_: data is taken every epoch: give an iterable, not an iterator")
    if not 0 <= margin < 1:
        raise ValueError(f"adapt_: margin must be in [0, 1), got {margin}")
    found = (0, epochs) if isinstance(epochs, int) else tuple(epochs)
    if len(found) != 2 or any(not isinstance(e, int) or e < 0 for e in found):
        raise ValueError(f"adapt_: epochs must be two numbers >= 0 or one, got {epochs!r}")
    return found


def touched(model: nn.Module, units: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Return what belongs to some units: parameter -> bool of its shape.

    Incoming weights and biases, entries of a BatchNorm behind the layer, and the weights of the
    layers that read the units. Raises ValueError for unknown layers and wrong shapes.
    """
    layers = watched_layers("adapt_", model, units)
    found: dict[nn.Parameter, Tensor] = {}

    def add(parameter: nn.Parameter | None, entries: Tensor) -> None:
        if parameter is not None:
            known = found.get(parameter)
            found[parameter] = entries if known is None else known | entries

    for name, chosen in units.items():
        layer = layers[name]
        if tuple(chosen.shape) != (layer.channels,):
            raise ValueError(
                f"adapt_: '{name}' has {layer.channels} units, got a mask of {list(chosen.shape)}"
            )
        module = layer.module
        chosen = chosen.to(module.weight.device)
        rows = chosen.view(-1, *[1] * (module.weight.dim() - 1))
        add(module.weight, rows.expand_as(module.weight))
        add(module.bias, chosen)
        if layer.norm is not None:
            norm = model.get_submodule(layer.norm)
            add(norm.weight, chosen)
            add(norm.bias, chosen)
        for follower in layer.followers:
            reader = model.get_submodule(follower.name)
            if getattr(reader, "groups", 1) != 1:
                continue
            columns = chosen.repeat_interleave(follower.fan)
            columns = columns.view(1, -1, *[1] * (reader.weight.dim() - 2))
            add(reader.weight, columns.expand_as(reader.weight))
    return found


class _Run:
    """One call of adapt_."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        margin: float,
        loss: Loss,
        make: MakeOptimizer,
        report: AdaptReport,
    ) -> None:
        self.model, self.batches, self.margin = model, batches, margin
        self.loss, self.make, self.report = loss, make, report
        self.devices = model_devices(model)

    def stage(self, number: int, epochs: int, parts: dict[nn.Parameter, Tensor] | None) -> None:
        """Train some epochs: everything, or only the entries that parts name."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if parts is not None:
            parameters = [p for p in parameters if p in parts and bool(parts[p].any())]
        if not parameters:
            return
        optimizer = self.make(parameters)
        keeper = keep_masks(self.model, optimizer)
        try:
            for epoch in range(1, epochs + 1):
                row = {"stage": number, "epoch": epoch}
                self.report.rows.append(row | self._epoch(optimizer, self._labelled(), parts))
        finally:
            keeper.remove()

    @torch.no_grad()
    def _labelled(self) -> list[tuple[object, Tensor, Tensor]]:
        """Return every batch with its labels and which samples are sure enough.

        The batches themselves: a loader that shuffles gives others, in another order, next time.
        """
        found = []
        with evaluating(self.model):
            for batch in self.batches:
                output, _ = call(self.model, batch, self.devices)
                if not bool(torch.isfinite(output).all()):
                    raise ValueError("adapt_: the output is not finite")
                best = F.softmax(output.float(), dim=1).topk(2, dim=1)
                sure = best.values[:, 0] - best.values[:, 1] > self.margin
                found.append((batch, best.indices[:, 0], sure))
        return found

    def _epoch(
        self,
        optimizer: torch.optim.Optimizer,
        labelled: list[tuple[object, Tensor, Tensor]],
        parts: dict[nn.Parameter, Tensor] | None,
    ) -> dict[str, float]:
        total, used, samples = 0.0, 0, 0
        with evaluating(self.model), torch.enable_grad():
            for batch, label, sure in labelled:
                samples += len(sure)
                if not bool(sure.any()):
                    continue
                output, _ = call(self.model, batch, self.devices)
                loss = self.loss(output[sure], label[sure])
                if not bool(torch.isfinite(loss.detach())):
                    raise ValueError(f"adapt_: the loss is {float(loss.detach())}")
                optimizer.zero_grad()
                loss.backward()
                self._step(optimizer, parts)
                total += float(loss.detach()) * int(sure.sum())
                used += int(sure.sum())
        return {"sure": used, "samples": samples, "loss": total / used if used else 0.0}

    @torch.no_grad()
    def _step(
        self, optimizer: torch.optim.Optimizer, parts: dict[nn.Parameter, Tensor] | None
    ) -> None:
        """Step; what is not to move is put back, whatever the optimizer's decay did to it."""
        if parts is None:
            optimizer.step()
            return
        held = [p for group in optimizer.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in held]
        for p in held:
            if p.grad is not None:
                p.grad.masked_fill_(~parts[p], 0)
        optimizer.step()
        for p, old in zip(held, kept, strict=True):
            p.copy_(torch.where(parts[p], p, old))
