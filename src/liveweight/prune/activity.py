"""What a layer sees of the data: observers on a model's inputs and outputs, filled in one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from liveweight.ops.activity_stats import activity_stats_, new_activity_stats
from liveweight.prune import batches

_STATS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Observer(Protocol):
    """Accumulates something over the batches that pass a layer."""

    def update(self, x: Tensor) -> None:
        """Take in one batch."""

    def check(self, name: str) -> None:
        """Raise ValueError naming the layer where what came cannot be used (NaN, no samples)."""


def _check_finite(name: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        bad = "NaN" if torch.isnan(values).any() else "infinite"
        raise ValueError(f"layer '{name}' saw {bad} activations; scores need finite ones")


class Activity:
    """Mean of |x| over samples, by one read of the activations.

    kind "linear": x [..., K], per feature; kind "conv": x [N, C, H, W], per map position.
    mean     float64 [K] or [C, H, W]: sum of |x| / number of samples (of rows, for "linear")
    """

    def __init__(self, kind: str) -> None:
        self._per = "feature" if kind == "linear" else "map"
        self.samples = 0
        self.shape: tuple[int, ...] | None = None
        self._stats: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if self._per == "map":
            x = x if x.dim() == 4 else x.unsqueeze(0)
            shape, rows = tuple(x.shape[1:]), x.shape[0]
        else:
            shape, rows = (x.shape[-1],), x[..., 0].numel()
        if self._stats is None:
            self.shape = shape
            self._stats = new_activity_stats(torch.Size(shape).numel(), device=x.device)
        if shape != self.shape:
            raise ValueError(
                f"activations changed shape from {list(self.shape)} to {list(shape)}: "
                "the samples of one call must have one size"
            )
        x = x.detach() if x.dtype in _STATS_DTYPES else x.detach().float()
        activity_stats_(self._stats, x, per=self._per)
        self.samples += rows

    def check(self, name: str) -> None:
        _check_finite(name, self._stats[0])

    @property
    def mean(self) -> Tensor:
        return (self._stats[0] / max(self.samples, 1)).reshape(self.shape)


class Alive:
    """Which output units are ever non-zero after the activation.

    activation  function after the layer ("relu" is decided by the largest value alone), or None
    alive       bool [channels]
    """

    def __init__(self, activation: str | None, fn: Callable | None, channel_dim: int) -> None:
        self._relu = activation == "relu"
        self._fn = fn
        self._dim = channel_dim
        self.alive: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if not self._relu:
            x = (x if self._fn is None else self._fn(x)).ne(0)
        if self._dim == -1:
            peak = x.reshape(-1, x.shape[-1]).amax(0) if x.numel() else None
        else:
            x = x if x.dim() == 4 else x.unsqueeze(0)
            peak = x.flatten(2).amax(2).amax(0) if x.numel() else None
        if peak is None:
            return
        # Written so that NaN counts as alive: it is reported by the check of the layer it reaches.
        alive = ~(peak <= 0) if self._relu else peak
        self.alive = alive if self.alive is None else self.alive | alive

    def check(self, name: str) -> None:
        return


@dataclass
class Watch:
    """An observer and where it looks: the "input" or the "output" of a module."""

    name: str
    module: nn.Module
    where: str
    observer: Observer


def _first_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    values = [*args, *kwargs.values()]
    return next((v for v in values if isinstance(v, Tensor)), None)


def _attach(watch: Watch, called: set[str]) -> torch.utils.hooks.RemovableHandle:
    def see(x: object) -> None:
        if not isinstance(x, Tensor):
            return
        called.add(watch.name)
        try:
            watch.observer.update(x)
        except ValueError as error:
            raise ValueError(f"layer '{watch.name}': {error}") from error

    if watch.where == "input":
        return watch.module.register_forward_pre_hook(
            lambda _, args, kwargs: see(_first_tensor(args, kwargs)), with_kwargs=True
        )
    return watch.module.register_forward_hook(lambda _, args, output: see(output))


@contextlib.contextmanager
def _watching(watches: Iterable[Watch]) -> Iterator[set[str]]:
    called: set[str] = set()
    handles = []
    try:
        for watch in watches:
            handles.append(_attach(watch, called))
        yield called
    finally:
        for handle in handles:
            handle.remove()


def observe(model: nn.Module, watches: list[Watch], data: Iterable) -> set[str]:
    """Run the model over the data in eval mode, without gradients; return the names it called.

    Raises ValueError for empty data, data on another device, and NaN or infinite activations (the
    layer is named). Modes and hooks are as before, also after an error.
    """
    with batches.evaluating(model), _watching(watches) as called:
        batches.run(model, data)
    for watch in watches:
        if watch.name in called:
            watch.observer.check(watch.name)
    return called
