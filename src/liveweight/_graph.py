"""Data-flow facts of a model, found by symbolic tracing: what follows a layer, what reads it.

Nothing here changes a model. A layer's channels are followed from its output through operations
that keep them apart (activations, pooling, dropout, flatten) to the weight layers that read them.
Whatever is not known to keep channels apart ends the walk and is named in `Layer.why_unsafe`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx, nn

from liveweight import _graph_ops as known
from liveweight._graph_flow import Flow, Follower, GraphError, reach
from liveweight._graph_residual import ResidualBlock, find_blocks

__all__ = ["Follower", "Graph", "GraphError", "Layer", "ResidualBlock", "trace"]


@dataclass
class Layer:
    """One nn.Linear or nn.Conv2d that the model calls exactly once.

    norm, activation, activation_name and pool are set only where the chain has no branch in
    between, so that the named modules may be fused into the layer.
    norm             name of the BatchNorm directly after the layer
    activation       name of the elementwise function after it (and after norm): "relu", "gelu", ...
    activation_name  module name of that function; None where it is called as a function
    activation_fn    the function itself, out of place
    zero_preserving  every operation after norm maps 0 to 0, so a unit whose input to the activation
                     is 0 hands 0 to every follower
    pool             name of the MaxPool2d directly after the activation
    followers        weight layers that read the channels
    is_output        the channels reach the model's output
    closed           followers and is_output together are all the consumers
    feeds            residual blocks whose shortcut takes the channels; () unless these blocks and
                     the followers are all the consumers
    safe             a unit that is zero may be cut out of this layer and of its followers
    why_unsafe       the reason where safe is False
    """

    name: str
    module: nn.Module
    kind: str
    norm: str | None = None
    activation: str | None = None
    activation_name: str | None = None
    activation_fn: Callable | None = None
    zero_preserving: bool = True
    pool: str | None = None
    followers: tuple[Follower, ...] = ()
    is_output: bool = False
    closed: bool = True
    feeds: tuple[str, ...] = ()
    why_unsafe: str = ""

    @property
    def channels(self) -> int:
        """Output units: out_features of a Linear, out_channels of a convolution."""
        return self.module.out_features if self.kind == "linear" else self.module.out_channels

    @property
    def safe(self) -> bool:
        return not self.why_unsafe


@dataclass
class Graph:
    """What `trace` found.

    layers           name -> Layer in execution order
    residual_blocks  basic blocks in execution order
    skipped          Linear and Conv2d left out -> why (called twice, never called)
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    residual_blocks: tuple[ResidualBlock, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)


def _describe_chain(flow: Flow, layer: Layer, node: fx.Node) -> fx.Node:
    """Fill norm, activation and pool; return the node after the norm."""
    after_norm = node
    user = flow.only_user(node)
    is_norm = user is not None and known.is_batch_norm(flow.module(user), layer.channels)
    if is_norm and flow.called_once(user):
        layer.norm, after_norm = str(user.target), user
        user = flow.only_user(user)
    activation = known.activation(user, flow.module(user)) if user is not None else None
    if activation is not None:
        layer.activation, layer.activation_fn = activation.name, activation.fn
        layer.activation_name = str(user.target) if user.op == "call_module" else None
        user = flow.only_user(user)
    if user is not None and isinstance(flow.module(user), nn.MaxPool2d) and layer.kind == "conv":
        layer.pool = str(user.target)
    return after_norm


def _find_layer(flow: Flow, node: fx.Node, feeds: Callable) -> Layer:
    module = flow.module(node)
    kind = "linear" if isinstance(module, nn.Linear) else "conv"
    layer = Layer(str(node.target), module, kind)
    after_norm = _describe_chain(flow, layer, node)
    found = reach(flow, after_norm, layer.channels, flat=kind == "linear")
    layer.followers = tuple(found.followers)
    layer.is_output = found.is_output
    layer.zero_preserving = found.zero_preserving
    layer.closed = not found.stops
    layer.feeds = () if found.is_output else feeds(found.stops) or ()
    if kind == "linear" and any(f.fan != 1 for f in layer.followers):
        layer.closed = False
        found.notes.append("a flatten joins several positions of a Linear's output")
    reasons = [reason for *_, reason in found.stops] + found.notes
    if found.is_output:
        reasons.append("its channels reach the model's output")
    if not found.followers and not reasons:
        reasons.append("nothing reads it")
    if kind == "conv" and module.groups != 1:
        reasons.append("it is a grouped convolution")
    layer.why_unsafe = "; ".join(dict.fromkeys(reasons))
    return layer


def trace(model: nn.Module) -> Graph:
    """Trace the model symbolically and return its layers and basic residual blocks.

    Raises GraphError with the reason where tracing fails (data-dependent control flow and so on).
    A reshape `view(-1, k)` is taken to keep the batch dimension, as it does in every usual model.
    """
    flow = Flow(model)
    graph = Graph()
    graph.residual_blocks, feeds = find_blocks(flow)
    for node in flow.nodes:
        if not flow.is_weight(node):
            continue
        if flow.called_once(node):
            graph.layers[str(node.target)] = _find_layer(flow, node, feeds)
        else:
            graph.skipped[str(node.target)] = "called more than once"
    used = {id(flow.module(n)) for n in flow.nodes if n.op == "call_module"}
    for name, module in flow.modules.items():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module) not in used:
            graph.skipped[name] = "never called"
    return graph
