"""A layer and the ReLU and max pooling after it that one sparse module can do in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from liveweight import _graph
from liveweight.compress import edit
from liveweight.compress.inputs import ExampleInputs, run


@dataclass
class Chain:
    """A Linear or Conv2d, its real input, and the modules after it that may join it."""

    name: str
    layer: nn.Module
    x: Tensor
    tail: list[tuple[str, nn.Module]] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """Dotted names of the layer and of the tail."""
        return (self.name, *(name for name, _ in self.tail))

    def dense(self) -> Callable[[], Tensor]:
        """Return the chain as it is, as one call."""
        return in_turn([self.layer, *(module for _, module in self.tail)], self.x)


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
    model: nn.Module, layer: _graph.Layer | None, calls: dict[str, int]
) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the ReLU and the MaxPool2d after a layer that may join it.

    Each must be the only reader of what is before it (the graph's fact), be called once, be
    registered once, and carry no hooks.
    """
    if layer is None or layer.norm:
        return []
    names = []
    if layer.activation:
        if layer.activation != "relu" or layer.activation_name is None:
            return []
        names.append(layer.activation_name)
    if layer.pool:
        names.append(layer.pool)
    paths = edit.paths_by_module(model)
    tail: list[tuple[str, nn.Module]] = []
    for name in names:
        module = model.get_submodule(name)
        if calls.get(name) != 1 or len(paths[id(module)]) != 1 or has_hooks(module):
            break
        if type(module) is not nn.ReLU and pool_size(module) is None:
            break
        tail.append((name, module))
    return tail


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
