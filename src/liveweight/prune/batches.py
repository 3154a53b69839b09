"""Feeding a model: what a batch is, how many are taken, and the state a pass leaves behind."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn


class Batches:
    """Batches from any iterable: tensors, tuples or lists whose first item is the input, or dicts.

    data     a single tensor or dict counts as one batch
    steps    take at most this many batches; None takes all
    passes   how often the batches will be read: with `steps` or a one-shot iterator they are then
             held in memory, so that every pass sees the same samples

    Raises TypeError where data is not iterable, ValueError where steps < 1.
    """

    def __init__(self, data: object, steps: int | None = None, passes: int = 1) -> None:
        if isinstance(data, (Tensor, Mapping)):
            data = [data]
        if not isinstance(data, Iterable):
            raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}")
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool)):
            raise TypeError(f"steps must be an int or None, got {type(steps).__name__}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if passes > 1 and (isinstance(data, Iterator) or steps is not None):
            data, steps = list(itertools.islice(data, steps)), None
        self._data, self._steps = data, steps

    def __iter__(self) -> Iterator:
        return itertools.islice(iter(self._data), self._steps)


def model_devices(model: nn.Module) -> set[torch.device]:
    return {t.device for t in itertools.chain(model.parameters(), model.buffers())}


def _check_device(batch: Iterable, devices: set[torch.device]) -> None:
    for value in batch:
        if isinstance(value, Tensor) and devices and value.device not in devices:
            where = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"data is on {value.device} but the model is on {where}: "
                f"move one of them with .to(...)"
            )


def call(model: nn.Module, batch: object, devices: set[torch.device]) -> tuple[object, Tensor]:
    """Run the model on one batch and return its output and the batch's first tensor.

    Raises ValueError where the batch is on another device than the model, TypeError where it is
    neither a tensor nor a tuple, list or dict of tensors.
    """
    if isinstance(batch, Mapping):
        tensors = [v for v in batch.values() if isinstance(v, Tensor)]
        _check_device(tensors, devices)
        return model(**batch), tensors[0] if tensors else torch.empty(())
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        raise TypeError(
            "a batch must be a tensor, a tuple or list whose first item is a tensor, or a dict; "
            f"got {type(batch).__name__}"
        )
    _check_device([first], devices)
    return model(first), first


def forward(model: nn.Module, batch: object, devices: set[torch.device]) -> int:
    """Run the model on one batch and return how many samples the batch holds; raises as `call`."""
    first = call(model, batch, devices)[1]
    return first.shape[0] if first.dim() else 1


def run(model: nn.Module, batches: Iterable) -> int:
    """Run the model on every batch without gradients and return the number of samples.

    Raises ValueError where there is no batch or no sample.
    """
    devices = model_devices(model)
    samples = count = 0
    with torch.no_grad():
        for batch in batches:
            samples += forward(model, batch, devices)
            count += 1
    if samples == 0:
        raise ValueError(
            "data is empty: " + ("its batches hold no samples" if count else "no batch came")
        )
    return samples


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; afterwards every module has its own former mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
