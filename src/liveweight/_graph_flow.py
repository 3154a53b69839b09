"""A traced model, and the walk that follows channels from a node to everything that reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx, nn

from liveweight import _graph_ops as known


class GraphError(ValueError):
    """The model cannot be traced symbolically; the message says why."""


@dataclass(frozen=True)
class Follower:
    """A weight layer that reads another layer's channels.

    fan     consecutive input features of the follower that belong to one channel: H*W where a
            flatten lies between a convolution and a Linear, 1 otherwise
    """

    name: str
    fan: int


@dataclass
class Call:
    """One call of a module seen while tracing; inner modules come before the outer one."""

    path: str
    inputs: tuple
    output: object


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.partition(".")[0] == __name__.partition(".")[0]
        ours = ours and not getattr(m, "traced_inside", False)
        return ours or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        output = super().call_module(m, forward, args, kwargs)
        inputs = tuple(a.node for a in args if isinstance(a, fx.Proxy))
        node = output.node if isinstance(output, fx.Proxy) else None
        self.calls.append(Call(self.path_of_module(m), inputs, node))
        return output


class Flow:
    """A traced graph and its module calls, with the walk that finds a node's consumers."""

    def __init__(self, model: nn.Module) -> None:
        tracer = _Tracer()
        try:
            self.nodes = list(tracer.trace(model).nodes)
        except Exception as error:  # noqa: BLE001 - tracing runs the user's forward: anything may come
            raise GraphError(f"the model cannot be traced symbolically: {error}") from error
        self.calls = tracer.calls
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.counts: dict[int, int] = {}
        for node in self.nodes:
            if node.op == "call_module":
                key = id(self.module(node))
                self.counts[key] = self.counts.get(key, 0) + 1

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that the node calls, None where it calls a function."""
        return self.modules[node.target] if node.op == "call_module" else None

    def is_weight(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), (nn.Linear, nn.Conv2d))

    def called_once(self, node: fx.Node) -> bool:
        return self.counts[id(self.module(node))] == 1

    def only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None


@dataclass
class Reach:
    """Where a node's channels arrive. `stops` end the walk: (node, the node before it, reason)."""

    followers: list[Follower] = field(default_factory=list)
    is_output: bool = False
    zero_preserving: bool = True
    stops: list[tuple[fx.Node, fx.Node, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def reach(flow: Flow, start: fx.Node, channels: int, flat: bool) -> Reach:
    """Follow `channels` channels from a node to everything that consumes them.

    flat: the channels are the last dimension (outputs of a Linear), not dimension 1 of a map.
    """
    found = Reach()
    pending = [(user, start, flat) for user in start.users]
    while pending:
        node, source, is_flat = pending.pop(0)
        module = flow.module(node)
        if node.op == "output":
            found.is_output = True
        elif known.is_size_query(node):
            continue
        elif flow.is_weight(node):
            _arrive(flow, node, source, channels, is_flat, found)
        elif (step := known.channel_step(node, source, module, channels, is_flat)) is None:
            found.stops.append((node, source, known.describe(node, module)))
        else:
            found.zero_preserving &= step.zero_preserving
            found.notes += [step.note] if step.note else []
            pending += [(user, node, step.flat) for user in node.users]
    return found


def _arrive(
    flow: Flow, node: fx.Node, source: fx.Node, channels: int, flat: bool, found: Reach
) -> None:
    module = flow.module(node)
    name = str(node.target)
    if not flow.called_once(node):
        found.stops.append((node, source, f"{name} reads it and is called more than once"))
    elif isinstance(module, nn.Conv2d):
        if flat or module.in_channels != channels:
            found.stops.append((node, source, f"{name} reads it in another shape"))
            return
        if module.groups != 1:
            found.notes.append(f"{name} is a grouped convolution")
        found.followers.append(Follower(name, 1))
    elif not flat or module.in_features % channels:
        found.stops.append((node, source, f"{name} reads it in another shape"))
    else:
        found.followers.append(Follower(name, module.in_features // channels))
