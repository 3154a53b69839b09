"""Spaces of channels: everything in a traced model that must be reordered together.

A space is born where a weight layer writes its output channels. It lasts through everything that
keeps channels apart, and ends in the weight layers that read it. A sum makes one space of two.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from liveweight import _graph_ops as known
from liveweight._graph_flow import Flow, Follower


@dataclass
class Space:
    """Channels that share one order.

    writers   Linear and Conv2d whose output units they are
    readers   Linear and Conv2d that take them as input; fan as in Follower
    vectors   modules with one entry per channel in every own tensor: norms, masks of shortcuts,
              depthwise convolutions
    fixed     why the order cannot be changed; "" where it can
    """

    channels: int
    writers: list[str] = field(default_factory=list)
    readers: list[Follower] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    fixed: str = ""

    def fix(self, reason: str) -> None:
        self.fixed = self.fixed or reason


@dataclass(frozen=True)
class _Carried:
    """What a node hands on: a space, and where its channels are.

    flat   they are the last dimension of the tensor, not dimension 1 of a map
    folds  a flattened map: the positions of a channel stand side by side
    """

    space: int
    flat: bool
    folds: bool = False


class _Walk:
    """One pass over the nodes in execution order; `merged` leads from a space to what it joined."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.spaces: list[Space] = []
        self.merged: list[int] = []
        self.carried: dict[fx.Node, _Carried] = {}

    def root(self, index: int) -> int:
        while self.merged[index] != index:
            index = self.merged[index]
        return index

    def space(self, node: fx.Node) -> Space:
        return self.spaces[self.root(self.carried[node].space)]

    def visit(self, node: fx.Node) -> None:
        sources = [n for n in node.all_input_nodes if n in self.carried]
        if self.flow.is_weight(node):
            self._weight(node, sources)
        elif node.op == "output":
            for source in sources:
                self.space(source).fix("it reaches the model's output")
        elif sources and not known.is_size_query(node):
            self._operation(node, sources)

    def _weight(self, node: fx.Node, sources: list[fx.Node]) -> None:
        module, name = self.flow.module(node), str(node.target)
        linear = isinstance(module, nn.Linear)
        if not self.flow.called_once(node):
            for source in sources:
                self.space(source).fix(f"{name} reads it and is called more than once")
            return
        channels = module.out_features if linear else module.out_channels
        if not linear and module.groups == module.in_channels == channels and sources:
            self._pass_on(node, sources[0], name, flat=False)
            return
        for source in sources:
            self._read(module, name, source)
        space = Space(channels, writers=[name])
        if not linear and module.groups != 1:
            space.fix(f"{name} is a grouped convolution")
        self.merged.append(len(self.spaces))
        self.carried[node] = _Carried(len(self.spaces), linear)
        self.spaces.append(space)

    def _read(self, module: nn.Module, name: str, source: fx.Node) -> None:
        space, flat, folds = (
            self.space(source),
            self.carried[source].flat,
            self.carried[source].folds,
        )
        if isinstance(module, nn.Conv2d):
            if flat or module.in_channels != space.channels:
                space.fix(f"{name} reads it in another shape")
            elif module.groups != 1:
                space.fix(f"{name} is a grouped convolution")
            else:
                space.readers.append(Follower(name, 1))
        elif not flat or module.in_features % space.channels:
            space.fix(f"{name} reads it in another shape")
        elif module.in_features != space.channels and not folds:
            space.fix("a flatten joins several positions of a Linear's output")
        else:
            space.readers.append(Follower(name, module.in_features // space.channels))

    def _operation(self, node: fx.Node, sources: list[fx.Node]) -> None:
        source, module = sources[0], self.flow.module(node)
        if known.is_add(node) and len(sources) == 2 and self._join(node, *sources):
            return
        if len(sources) == 1 and node.args and node.args[0] is source:
            space, flat = self.space(source), self.carried[source].flat
            if _has_vectors(module, space.channels, flat):
                self._pass_on(node, source, str(node.target), flat)
                return
            step = known.channel_step(node, source, module, space.channels, flat)
            if step is not None and (isinstance(module, nn.PReLU) or not _own_tensors(module)):
                folds = self.carried[source].folds or (step.flat and not flat)
                self.carried[node] = _Carried(self.carried[source].space, step.flat, folds)
                return
        for source in sources:
            self.space(source).fix(known.describe(node, module))

    def _pass_on(self, node: fx.Node, source: fx.Node, name: str, flat: bool) -> None:
        space = self.space(source)
        if flat != self.carried[source].flat or not self.flow.called_once(node):
            space.fix(f"{name} reads it in another shape or is called more than once")
            return
        space.vectors.append(name)
        self.carried[node] = self.carried[source]

    def _join(self, node: fx.Node, left: fx.Node, right: fx.Node) -> bool:
        a, b = (self.root(self.carried[n].space) for n in (left, right))
        same = self.spaces[a].channels == self.spaces[b].channels
        operands = list(node.args) == [left, right] and not node.kwargs
        shapes = [(self.carried[n].flat, self.carried[n].folds) for n in (left, right)]
        if not (same and operands and shapes[0] == shapes[1]):
            return False
        if a != b:
            one, other = self.spaces[a], self.spaces[b]
            one.writers += other.writers
            one.readers += other.readers
            one.vectors += other.vectors
            one.fix(other.fixed)
            self.merged[b] = a
        self.carried[node] = self.carried[left]
        return True


def _has_vectors(module: nn.Module | None, channels: int, flat: bool) -> bool:
    """True for modules that treat channels alike, but for one entry per channel."""
    if isinstance(module, nn.LayerNorm):
        return flat and tuple(module.normalized_shape) == (channels,)
    if getattr(module, "channelwise", False) is True:
        own = _own_tensors(module)
        return not flat and bool(own) and all(t.dim() and t.shape[0] == channels for t in own)
    return known.is_batch_norm(module, channels)


def _own_tensors(module: nn.Module | None) -> list[Tensor]:
    return [] if module is None else [*module.parameters(), *module.buffers()]


def find_spaces(model: nn.Module) -> list[Space]:
    """Trace the model symbolically and return its spaces in execution order.

    Raises GraphError with the reason where tracing fails.
    """
    walk = _Walk(Flow(model))
    for node in walk.flow.nodes:
        walk.visit(node)
    return [space for i, space in enumerate(walk.spaces) if walk.merged[i] == i]
