"""Residual: a residual block whose sum is written over the branch's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Stands for a block that computes y = act(branch(x) + shortcut(x)), with its modules.

    x        what the block takes, a single tensor
    returns  what the block returns

    Where no gradient is recorded, the sum and the ReLU are written into the branch's output, which
    spares two passes over new memory; modules that became nn.Identity are not called. The block's
    modules keep their names, and what else it has as attributes stays readable.

    block       the module that is replaced; its modules are shared, not copied
    branch      names of its modules in order, "" for a ReLU; the last one that is no nn.Identity
                returns a tensor that nobody else holds
    shortcut    name of the module for the other summand; None: x itself
    activation  None or "relu", applied to the sum

    Raises ValueError for a block with parameters or buffers of its own, unknown names and other
    activations.
    """

    traced_inside = True  # for symbolic tracing: its layers are seen, not the block alone

    def __init__(
        self,
        block: nn.Module,
        branch: Sequence[str],
        shortcut: str | None = None,
        activation: str | None = "relu",
    ) -> None:
        super().__init__()
        if block._parameters or block._buffers:
            raise ValueError("Residual: the block has parameters or buffers of its own")
        if activation not in (None, "relu"):
            raise ValueError(f"Residual: activation must be None or 'relu', got {activation!r}")
        modules = dict(block.named_modules(remove_duplicate=False))
        for name in filter(None, (*branch, shortcut)):
            if name not in modules:
                raise ValueError(f"Residual: the block has no module {name!r}")
        self.branch, self.shortcut_name = tuple(branch), shortcut
        self.activation = activation
        self._steps = tuple(tuple(name.split(".")) if name else () for name in self.branch)
        self._shortcut_step = tuple(shortcut.split(".")) if shortcut else ()
        # Not setattr: the block would become a module of this one, under another name.
        self.__dict__["_modules"] = block._modules
        self.__dict__["_block"] = block
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return act(branch(x) + shortcut(x))."""
        y = x
        for step in self._steps:
            module = self._find(step)
            if module is None:
                y = torch.relu(y)
            elif type(module) is not nn.Identity:
                y = module(y)
        other = self._find(self._shortcut_step)
        other = x if other is None else other(x)
        if torch.is_grad_enabled() or y.dtype is not other.dtype or y.shape != other.shape:
            y = y + other
            return y if self.activation is None else torch.relu(y)
        y.add_(other)
        return y if self.activation is None else torch.relu_(y)

    def _find(self, step: tuple[str, ...]) -> nn.Module | None:
        module = None
        for name in step:
            module = (self if module is None else module)._modules[name]
        return module

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            block = self.__dict__.get("_block")
            if block is None or name.startswith("_"):
                raise
            return getattr(block, name)

    def extra_repr(self) -> str:
        """The order of the modules."""
        names = " > ".join(name or "relu" for name in self.branch)
        return f"{names}, + {self.shortcut_name or 'x'}, activation={self.activation}"
