"""Pruning while training: one step() after each optimizer step, whatever the training loop."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from liveweight.prune.importances import Importance
from liveweight.prune.keep import MaskKeeper
from liveweight.prune.mask import module_masks
from liveweight.prune.report import PruneReport
from liveweight.prune.retrain import rewind_
from liveweight.prune.schedule import Schedule
from liveweight.prune.verbs import prune_


class Pruner:
    """Prunes a model at the steps of a schedule and keeps its zeros in between.

        for x, y in loader:
            loss(model(x), y).backward()
            optimizer.step(); optimizer.zero_grad()
            pruner.step()

    schedule    OneShot, Iterative, Cubic, Then, or any object with at(step) and last
    data        what the importance needs, taken anew at each pruning (an iterable, no iterator)
    importance  a name or an object
    rewind      after each pruning: None: train on; "init": the values at the time of construction;
                a step number: those after that step, before the first pruning. The optimizer's
                state starts anew then; a learning-rate schedule is the caller's
    regrow      masks are redrawn from dense weights at every step of the schedule: a dropped weight
                keeps a value that the optimizer goes on training, with the gradient at zero passed
                straight through, and may return. The model itself always holds the zeros
    options     of prune_: granularity, block, pattern, scope, layers, ignore, steps

    Without regrow, sparsity only rises and dropped weights stay zero (keep_masks). With it, masks
    are fixed from the schedule's last step on, or from finish().

    Raises ValueError for an iterator as data, rewind with regrow, and an unusable rewind; step()
    raises what prune_ raises, and leaves the model as it was then.
    Source of regrowth: Lin, Stich, Barba, Dmitriev, Jaggi, "Dynamic model pruning with feedback",
    ICLR 2020.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        data: Iterable | None = None,
        *,
        importance: str | Importance = "magnitude",
        rewind: str | int | None = None,
        regrow: bool = False,
        **options: object,
    ) -> None:
        if data is not None and iter(data) is data:
            raise ValueError("data must be an iterable that can be taken again, not an iterator")
        _check_rewind(rewind, regrow, schedule)
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.data, self.importance, self.options = data, importance, options
        self.rewind, self.regrow = rewind, regrow
        self.count = 0
        self.reports: list[PruneReport] = []
        self._start = copy.deepcopy(model.state_dict()) if rewind == "init" else None
        self._dropped = _Dropped(model, optimizer) if regrow else None
        self._keeper = None if regrow else MaskKeeper(model, optimizer)

    def step(self) -> PruneReport | None:
        """Count one optimizer step; prune where the schedule says so and return the report."""
        self.count += 1
        if self.rewind == self.count and not isinstance(self.rewind, str):
            self._start = copy.deepcopy(self.model.state_dict())
        sparsity = self.schedule.at(self.count)
        report = None
        if sparsity is not None:
            report = self._prune(sparsity)
            self.reports.append(report)
        if self.regrow and self.count >= self.schedule.last:
            self.finish()
        return report

    def _prune(self, sparsity: float) -> PruneReport:
        options = {"importance": self.importance, "sparsity": sparsity, **self.options}
        if self._dropped is not None:
            return self._dropped.redraw(lambda: prune_(self.model, self.data, **options))
        report = prune_(self.model, self.data, **options)
        if self._start is not None:
            rewind_(self.model, self._start)
            self.optimizer.state.clear()
        return report

    def finish(self) -> None:
        """Fix the masks as they are; dropped weights are gone. Nothing to do without regrow."""
        if self._dropped is not None:
            self._dropped.remove()
            self._dropped = None
            self._keeper = MaskKeeper(self.model, self.optimizer)

    def state_dict(self) -> dict[str, object]:
        """Return what a run must save to go on: the model's and optimizer's states come beside."""
        dropped = None if self._dropped is None else self._dropped.values_by_name()
        return {"count": self.count, "start": self._start, "dropped": dropped}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a state; the model holds its masks and values already (prune.load_state_)."""
        self.count, self._start = state["count"], state["start"]
        if state["dropped"] is None:
            self.finish()
        elif self._dropped is not None:
            self._dropped.load(state["dropped"])


def _check_rewind(rewind: str | int | None, regrow: bool, schedule: Schedule) -> None:
    if rewind is None:
        return
    if regrow:
        raise ValueError("rewind and regrow exclude each other: dense weights go on training")
    if rewind == "init":
        return
    whole = isinstance(rewind, int) and not isinstance(rewind, bool)
    first = next((s for s in range(1, schedule.last + 1) if schedule.at(s) is not None), 0)
    if not whole or not 1 <= rewind <= first:
        raise ValueError(
            f"rewind must be None, 'init' or a step from 1 to the first pruning ({first}), got "
            f"{rewind!r}"
        )


class _Dropped:
    """Values of dropped weights, on which the optimizer goes on: in its step they are in place."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._values: dict[int, Tensor] = {}  # by id of the parameter, which the model holds
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self.put_back()),
            optimizer.register_step_post_hook(lambda *_: self.take_out()),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the dropped values into the parameters: they are dense then."""
        for module in self._model.modules():
            for _, parameter, mask in module_masks(module):
                values = self._values.get(id(parameter))
                if values is not None:
                    parameter.copy_(torch.where(mask.bool(), parameter, values))

    @torch.no_grad()
    def take_out(self) -> None:
        """Set the dropped entries to zero and remember what they were."""
        for module in self._model.modules():
            for _, parameter, mask in module_masks(module):
                self._values[id(parameter)] = parameter.detach().clone()
                parameter.masked_fill_(~mask.bool(), 0)

    def redraw(self, prune) -> PruneReport:
        """Let prune() draw masks from the dense weights; on an error all is as before."""
        self.put_back()
        removed = []
        for module in self._model.modules():
            for name, _, mask in list(module_masks(module)):
                removed.append((module, f"{name}_mask", mask))
                del module._buffers[f"{name}_mask"]
        dense = {id(p): p.detach().clone() for p in self._model.parameters()}
        try:
            report = prune()
        except BaseException:
            for module, name, mask in removed:
                module.register_buffer(name, mask)
            self.take_out()
            raise
        for module in self._model.modules():
            for _, parameter, _ in module_masks(module):
                self._values[id(parameter)] = dense[id(parameter)]
        return report

    def values_by_name(self) -> dict[str, Tensor]:
        named = self._model.named_parameters()
        return {n: self._values[id(p)].clone() for n, p in named if id(p) in self._values}

    def load(self, values: dict[str, Tensor]) -> None:
        own = dict(self._model.named_parameters())
        self._values = {id(own[n]): v.clone() for n, v in values.items()}
