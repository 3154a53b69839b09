"""Undo: what an in-place verb may change of a model, saved before and put back after a failure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_TABLES = ("_parameters", "_buffers", "_modules", "_forward_pre_hooks")
_TOUCHED = (nn.Linear, nn.Conv2d, nn.modules.batchnorm._BatchNorm)


class Snapshot:
    """The tables of every module, and copies of the tensors of layers that can be pruned."""

    def __init__(self, model: nn.Module) -> None:
        self._tables = [
            (module, {t: dict(getattr(module, t)) for t in _TABLES}, dict(module.__dict__))
            for module in model.modules()
        ]
        self._values: list[tuple[Tensor, Tensor]] = []
        for module in model.modules():
            ours = type(module).__module__.partition(".")[0] == __name__.partition(".")[0]
            if isinstance(module, _TOUCHED) or ours:
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is not None and not nn.parameter.is_lazy(tensor):
                        self._values.append((tensor, tensor.detach().clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put tables and values back, bit for bit."""
        for module, tables, attributes in self._tables:
            for name, saved in tables.items():
                table = getattr(module, name)
                table.clear()
                table.update(saved)
            for key in module.__dict__.keys() - attributes.keys():
                del module.__dict__[key]
            module.__dict__.update(attributes)
        for tensor, value in self._values:
            tensor.copy_(value)


@contextlib.contextmanager
def restoring(model: nn.Module, always: bool = False) -> Iterator[None]:
    """Restore the model where the body raises; always=True restores it in any case (dry run)."""
    snapshot = Snapshot(model)
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise
    if always:
        snapshot.restore()
