"""What a layer sees of the data: observers on a model's inputs and outputs, filled in one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from liveweight.ops.activity_stats import add_activity, new_activity_stats
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


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_no_capture(x: Tensor) -> None:
    if _is_capturing(x):
        raise RuntimeError(
            "an observer saw its first batch while a CUDA graph was captured: run one batch "
            "before the capture and call reset() after it"
        )


class Counted:
    """What observers share: they add in place, so that a CUDA graph can hold their updates.

    The first batch must be seen before the capture: it makes the sums, which the graph then adds
    to. reset() forgets that batch. Replays are counted on the GPU.

    samples  number of samples (of rows, for a Linear)
    shape    of one sample
    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] | None = None
        self._seen = 0
        self._replayed: Tensor | None = None  # int64 scalar beside the sums, on a GPU

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if self.shape is None:
            self.shape = shape
        if shape != self.shape:
            raise ValueError(
                f"activations changed shape from {list(self.shape)} to {list(shape)}: "
                "the samples of one call must have one size"
            )

    def _start(self, x: Tensor) -> None:
        """Prepare for the first batch; raises RuntimeError while a CUDA graph is captured."""
        _check_no_capture(x)
        if x.is_cuda:
            self._replayed = torch.zeros((), dtype=torch.int64, device=x.device)

    def _count(self, samples: int) -> None:
        if self._replayed is not None and _is_capturing(self._replayed):
            self._replayed += samples
        else:
            self._seen += samples

    @property
    def samples(self) -> int:
        return self._seen + (0 if self._replayed is None else int(self._replayed))

    def reset(self) -> None:
        """Forget all samples; the sums stay where they are."""
        self._seen = 0
        if self._replayed is not None:
            self._replayed.zero_()


class Activity(Counted):
    """Means over samples of |x| and of x^2, by one read of the activations.

    kind "linear": x [..., K], per feature; kind "conv": x [N, C, H, W], per map position.
    mean         float64 [K] or [C, H, W]: sum of |x| / number of samples (of rows, for "linear")
    mean_square  the same of x^2
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._per = "feature" if kind == "linear" else "map"
        self._stats: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if self._per == "map":
            x = x if x.dim() == 4 else x.unsqueeze(0)
            shape, rows = tuple(x.shape[1:]), x.shape[0]
        else:
            shape, rows = (x.shape[-1],), x[..., 0].numel()
        if self._stats is None:
            self._start(x)
        self._check_shape(shape)
        if self._stats is None:
            self._stats = new_activity_stats(torch.Size(shape).numel(), device=x.device)
        x = x.detach() if x.dtype in _STATS_DTYPES else x.detach().float()
        add_activity(self._stats, x, self._per, 0.0)
        self._count(rows)

    def reset(self) -> None:
        super().reset()
        if self._stats is not None:
            self._stats.zero_()

    def check(self, name: str) -> None:
        _check_finite(name, self._stats[0])

    @property
    def mean(self) -> Tensor:
        return (self._stats[0] / max(self.samples, 1)).reshape(self.shape)

    @property
    def mean_square(self) -> Tensor:
        return (self._stats[1] / max(self.samples, 1)).reshape(self.shape)


class Alive:
    """Which output units are ever non-zero after the activation.

    activation  function after the layer ("relu" is decided by the largest value alone), or None
    alive       bool [channels]; None before the first value
    """

    def __init__(self, activation: str | None, fn: Callable | None, channel_dim: int) -> None:
        self._relu = activation == "relu"
        self._fn = fn
        self._dim = channel_dim
        self._peak: Tensor | None = None  # [channels] largest value, or bool: ever non-zero

    def update(self, x: Tensor) -> None:
        if not self._relu:
            x = (x if self._fn is None else self._fn(x)).ne(0)
        if x.numel() == 0:
            return
        peak = self._largest(x.detach())
        if self._peak is None:
            _check_no_capture(x)
            self._peak = peak
        else:
            torch.maximum(self._peak, peak, out=self._peak)  # in place: a CUDA graph can hold it

    def _largest(self, x: Tensor) -> Tensor:
        if self._dim == -1:
            return x.reshape(-1, x.shape[-1]).amax(0)
        x = x if x.dim() == 4 else x.unsqueeze(0)
        # One launch on a GPU; CPUs are faster along one dimension after the other.
        return x.amax((0, 2, 3)) if x.is_cuda else x.flatten(2).amax(2).amax(0)

    def reset(self) -> None:
        """Forget what came so far."""
        if self._peak is not None:
            self._peak.fill_(float("-inf") if self._relu else False)

    @property
    def alive(self) -> Tensor | None:
        if self._peak is None or not self._relu:
            return self._peak
        # Written so that NaN counts as alive: it is reported by the check of the layer it reaches.
        return ~(self._peak <= 0)

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
    if args and isinstance(args[0], Tensor):
        return args[0]
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
