"""Which operations keep channels apart, and which functions map zero to zero."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Hardtanh, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softsign,
    nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softplus, nn.Threshold,
)  # fmt: skip
_ELEMENTWISE_NAMES = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu", "gelu",
    "silu", "mish", "tanh", "tanh_", "hardtanh", "hardswish", "hardshrink", "softshrink",
    "tanhshrink", "softsign", "sigmoid", "sigmoid_", "hardsigmoid", "logsigmoid", "softplus",
    "threshold", "abs", "square", "sqrt", "clamp", "clamp_min",
}  # fmt: skip
_MIXING_MODULES = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin)
_MIXING_NAMES = frozenset({"softmax", "log_softmax", "softmin"})
_POOL_MODULES = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d,
)  # fmt: skip
_POOL_NAMES = {"avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"}
_SAME_MODULES = (nn.Identity, nn.Dropout, nn.AlphaDropout)
_SAME_MAP_MODULES = (nn.Dropout2d, nn.FeatureAlphaDropout)
_SAME_NAMES = frozenset({"dropout", "dropout_", "contiguous", "clone", "detach"})
_MAP_DIMS = ({2, 3}, {-1, -2})


@dataclass(frozen=True)
class Activation:
    """An elementwise function: its name, and the function itself out of place."""

    name: str
    fn: Callable[[Tensor], Tensor]

    @property
    def zero_preserving(self) -> bool:
        return bool(self.fn(torch.zeros(1, 1, 1, 1)).eq(0).all())


@dataclass(frozen=True)
class Step:
    """One operation on the way of a channel: is it flat afterwards, does 0 stay 0."""

    flat: bool
    zero_preserving: bool = True
    note: str = ""


def function_name(node: fx.Node) -> str:
    """Return the bare name of the function or method that a node calls, "" for modules."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def describe(node: fx.Node, module: nn.Module | None) -> str:
    """Return how to name a node that ends the walk."""
    if is_add(node):
        return "it takes part in a residual add"
    if function_name(node) in {"cat", "concat", "concatenate", "stack"}:
        return "it is concatenated with other channels"
    what = f"{node.target} ({type(module).__name__})" if module is not None else function_name(node)
    return f"{what} is not known to keep channels apart"


def is_add(node: fx.Node) -> bool:
    return node.target in (operator.add, operator.iadd, torch.add) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )


def is_size_query(node: fx.Node) -> bool:
    """True for x.size(...), x.shape, x.dim(): they read no values."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and len(node.args) > 1 and node.args[1] in ("shape", "ndim")


def is_batch_norm(module: nn.Module | None, channels: int) -> bool:
    return isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.num_features == channels


def _out_of_place_name(name: str) -> str:
    return name.removesuffix("_")


def activation(node: fx.Node, module: nn.Module | None) -> Activation | None:
    """Return the elementwise activation that a node applies, None where it applies none."""
    if isinstance(module, _ELEMENTWISE_MODULES) or (
        isinstance(module, nn.PReLU) and module.num_parameters == 1
    ):
        # forward, not __call__: the module's own hooks must not run; clone: it may be in place.
        return Activation(type(module).__name__.lower(), lambda x: module.forward(x.clone()))
    name = function_name(node)
    if name not in _ELEMENTWISE_NAMES or any(isinstance(a, fx.Node) for a in node.args[1:]):
        return None
    args = node.args[1:]
    kwargs = {k: v for k, v in node.kwargs.items() if k != "input"}
    if any(isinstance(v, fx.Node) for v in kwargs.values()):
        return None
    if node.op == "call_method":
        return Activation(
            _out_of_place_name(name), lambda x: getattr(x.clone(), name)(*args, **kwargs)
        )
    target = node.target
    return Activation(_out_of_place_name(name), lambda x: target(x.clone(), *args, **kwargs))


def _spatial_dims(node: fx.Node) -> set[int] | None:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if isinstance(dims, (tuple, list)) and all(isinstance(d, int) for d in dims):
        return set(dims)
    return None


def _flatten_step(node: fx.Node, module: nn.Module | None, channels: int) -> Step | None:
    if isinstance(module, nn.Flatten):
        return Step(True) if (module.start_dim, module.end_dim) == (1, -1) else None
    args = list(node.args[1:])
    if function_name(node) == "flatten":
        start = node.kwargs.get("start_dim", args[0] if args else 0)
        end = node.kwargs.get("end_dim", args[1] if len(args) > 1 else -1)
        return Step(True) if (start, end) == (1, -1) else None
    if function_name(node) not in ("view", "reshape"):
        return None
    shape = list(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    if len(shape) != 2:
        return None
    rows, columns = shape
    keeps_batch = rows == -1 or isinstance(rows, fx.Node)
    whole = columns == -1 or (isinstance(columns, int) and columns % channels == 0)
    return Step(True) if keeps_batch and whole and (rows, columns) != (-1, -1) else None


def _map_step(node: fx.Node, module: nn.Module | None) -> Step | None:
    """Operations on a map [N, C, H, W]."""
    name = function_name(node)
    if isinstance(module, (*_POOL_MODULES, *_SAME_MAP_MODULES)):
        return Step(False)
    if getattr(module, "channelwise", False) is True:
        return Step(False)
    if name in _POOL_NAMES or name.startswith(("max_pool2d", "_max_pool2d", "dropout2d")):
        return Step(False)
    if name in ("mean", "amax") and _spatial_dims(node) in _MAP_DIMS:
        return Step(not node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2]))
    return None


def channel_step(
    node: fx.Node, source: fx.Node, module: nn.Module | None, channels: int, flat: bool
) -> Step | None:
    """Return what an operation does to channels that it keeps apart, None where it may mix them."""
    if not node.args or node.args[0] is not source or sum(a is source for a in node.args) > 1:
        return None
    if (function := activation(node, module)) is not None:
        zero = function.zero_preserving
        return Step(flat, zero, "" if zero else f"{function.name}(0) is not 0")
    if isinstance(module, _SAME_MODULES) or function_name(node) in _SAME_NAMES:
        return Step(flat)
    if isinstance(module, _MIXING_MODULES) or function_name(node) in _MIXING_NAMES:
        name = type(module).__name__.lower() if module is not None else function_name(node)
        return Step(flat, False, f"{name} mixes channels")
    if is_batch_norm(module, channels):
        return Step(flat, False, f"{node.target} normalizes it after another operation")
    if (step := _flatten_step(node, module, channels)) is not None:
        return step
    return None if flat else _map_step(node, module)


def zero_channels_before(node: fx.Node) -> int | None:
    """Return how many channels F.pad puts before those of a map; None for another operation."""
    if node.op != "call_function" or node.target is not F.pad:
        return None
    pad = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(pad, (tuple, list)) or len(pad) < 6:
        return None
    return int(pad[4])
