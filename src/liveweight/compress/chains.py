"""A layer and what follows it that one module can do in the same pass: norm, activation, pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from liveweight import _graph
from liveweight.compress import edit
from liveweight.compress.fold import fold_norm, why_not_folded
from liveweight.compress.inputs import ExampleInputs, run


@dataclass
class Chain:
    """A Linear or Conv2d, its real input, and the modules after it that may join it."""

    name: str
    layer: nn.Module
    x: Tensor
    tail: list[tuple[str, nn.Module]] = field(default_factory=list)
    _folded: dict[int, nn.Module] = field(default_factory=dict)

    def folded(self, norm: nn.Module) -> nn.Module:
        """Return the layer with a BatchNorm folded into it, made once."""
        if id(norm) not in self._folded:
            self._folded[id(norm)] = fold_norm(self.layer, norm)
        return self._folded[id(norm)]

    @property
    def names(self) -> tuple[str, ...]:
        """Dotted names of the layer and of the tail."""
        return (self.name, *(name for name, _ in self.tail))

    @property
    def kinds(self) -> list[str]:
        """What the modules of the tail are: "norm", an activation's name, "pool"."""
        kind = "linear" if isinstance(self.layer, nn.Linear) else "conv"
        return [
            "pool" if pool_size(module) is not None else activation_of(module, kind) or "norm"
            for _, module in self.tail
        ]

    def dense(self, x: Tensor | None = None) -> Callable[[], Tensor]:
        """Return the chain as it is, as one call."""
        modules = [self.layer, *(module for _, module in self.tail)]
        return in_turn(modules, self.x if x is None else x)


def in_turn(modules: list[nn.Module], x: Tensor) -> Callable[[], Tensor]:
    """Return a call that hands x through the modules."""
    if len(modules) == 1:
        only = modules[0]
        return lambda: only(x)

    def call() -> Tensor:
        y = x
        for module in modules:
            y = module(y)
        return y

    return call


@dataclass
class Sample:
    """What one run of the example inputs showed: first inputs and numbers of calls, by module."""

    inputs: dict[str, tuple] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


def sample(model: nn.Module, inputs: ExampleInputs, keep: set[str]) -> tuple[Sample, object]:
    """Run the model once; return calls of every module, inputs of the named ones, the outputs."""
    found = Sample()
    handles = []
    for name, module in model.named_modules():

        def note(_module, args, kwargs, name=name) -> None:
            found.calls[name] = found.calls.get(name, 0) + 1
            if name in keep and name not in found.inputs:
                plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
                # Cloned: a later module may work in place on what this one received.
                found.inputs[name] = (args[0].detach().clone(),) if plain else ()

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        outputs = run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found, outputs


def find_tail(
    model: nn.Module, layer: _graph.Layer | None, found: Sample, x: Tensor, notes: list[str]
) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the BatchNorm, activation and MaxPool2d after a layer that may join.

    Each must be the only reader of what is before it (the graph's fact), be called once, be
    registered once, and carry no hooks. Max pooling behind a ReLU that is called as a function
    may join without it: max(relu(x)) = relu(max(x)). x is what the layer receives; notes takes why
    a BatchNorm stays.
    """
    if layer is None:
        return []
    paths = edit.paths_by_module(model)
    tail: list[tuple[str, nn.Module]] = []
    for name in _names_behind(layer):
        module = model.get_submodule(name)
        if found.calls.get(name) != 1 or len(paths[id(module)]) != 1 or has_hooks(module):
            break
        if name == layer.norm:
            reason = why_not_folded(module, edit.tied_parameters(model))
            if not reason and layer.kind == "linear" and x.dim() != 2:
                reason = "it normalizes positions, not features"
            if reason:
                notes.append(f"{name} was not folded into {layer.name}: {reason}")
                break
        elif activation_of(module, layer.kind) is None and pool_size(module) is None:
            break
        tail.append((name, module))
    return tail


def _names_behind(layer: _graph.Layer) -> list[str]:
    names = [layer.norm] if layer.norm else []
    if layer.activation:
        if layer.activation_name is not None:
            names.append(layer.activation_name)
        elif layer.activation != "relu":
            return names
    return [*names, layer.pool] if layer.pool else names


def activation_of(module: nn.Module, kind: str) -> str | None:
    """Return the name of an activation that a layer of this kind ("linear", "conv") can take in."""
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.GELU and kind == "linear":
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return None


def pool_size(module: nn.Module) -> int | None:
    """Return p for max pooling of p x p windows at stride p without padding, else None."""
    if type(module) is not nn.MaxPool2d:
        return None
    kernel, stride = _pair(module.kernel_size), _pair(module.stride)
    plain = _pair(module.padding) == (0, 0) and _pair(module.dilation) == (1, 1)
    plain = plain and not module.ceil_mode and not module.return_indices
    square = kernel[0] == kernel[1] > 1 and kernel == stride
    return kernel[0] if plain and square else None


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def has_hooks(module: nn.Module) -> bool:
    """True where someone watches or changes the module's calls."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
