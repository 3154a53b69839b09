"""Residual blocks: a branch of convolutions added to a shortcut of the same input."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx, nn

from liveweight import _graph_ops as known
from liveweight._graph_flow import Flow, Follower, reach


@dataclass(frozen=True)
class ResidualBlock:
    """conv1 - norm1 - activation - conv2 - norm2, added to a shortcut of the block's input.

    shortcut         name of the module that computes the shortcut; None where none has a name
    shortcut_kind    "identity", "projection" (1x1 convolution and BatchNorm), "pad" (strided slice
                     and zero channels) or "other"
    projection       name of the shortcut's convolution; projection_norm of its BatchNorm
    pad_before       zero channels that a "pad" shortcut puts before the input's channels
    consumers        followers of the block's output; feeds: blocks that take it as their shortcut
    closed           consumers and feeds are all that reads the block's output
    branch           names of the branch's modules in order, "" for a ReLU called as a function
    activation       "relu" where one follows the add and is its only reader; None where none does
    activation_name  name of that module; None where it is called as a function
    whole            the module called name computes activation(branch(x) + shortcut(x)), no more
    """

    name: str
    conv1: str
    conv2: str
    norm2: str | None
    shortcut: str | None
    shortcut_kind: str
    projection: str | None = None
    projection_norm: str | None = None
    pad_before: int = 0
    consumers: tuple[Follower, ...] = ()
    feeds: tuple[str, ...] = ()
    closed: bool = False
    branch: tuple[str, ...] = ()
    activation: str | None = None
    activation_name: str | None = None
    whole: bool = False


@dataclass
class _Branch:
    """A chain of convolutions read backwards from an add to the block's input; order: its nodes."""

    convs: list[fx.Node]
    norm: fx.Node | None
    source: fx.Node
    order: list[fx.Node]

    @property
    def nodes(self) -> set[fx.Node]:
        return set(self.order)


def _first_input(node: fx.Node) -> fx.Node | None:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _read_branch(flow: Flow, end: fx.Node) -> _Branch | None:
    """Read [norm] conv (activation [norm] conv)... backwards; None where end is no such chain."""
    branch = _Branch([], None, end, [])
    node: fx.Node | None = end
    while node is not None and len(node.users) == 1:
        module = flow.module(node)
        if isinstance(module, nn.Conv2d) and flow.called_once(node):
            branch.convs.insert(0, node)
        elif isinstance(module, nn.BatchNorm2d):
            branch.norm = node if not branch.convs and branch.norm is None else branch.norm
        elif not branch.convs or not known.activation(node, module):
            break
        branch.order.insert(0, node)
        node = _first_input(node)
        if branch.convs and _first_input(branch.convs[0]) is node:
            branch.source = node
    return branch if len(branch.convs) >= 2 else None


def _read_shortcut(flow: Flow, end: fx.Node, source: fx.Node) -> list[fx.Node] | None:
    """Return the nodes from end back to source, without it; None where source is not reached."""
    chain: list[fx.Node] = []
    node: fx.Node | None = end
    while node is not source:
        if node is None or node.op not in ("call_module", "call_function", "call_method"):
            return None
        chain.append(node)
        node = _first_input(node)
    return chain


def _shortcut_kind(flow: Flow, chain: list[fx.Node]) -> tuple[str, dict]:
    modules = [flow.module(n) for n in chain]
    same = [isinstance(m, nn.Identity) or getattr(m, "channelwise", False) is True for m in modules]
    rest = [n for n, passes in zip(chain, same, strict=True) if not passes]
    convs = [n for n in rest if isinstance(flow.module(n), nn.Conv2d)]
    norms = [n for n in rest if isinstance(flow.module(n), nn.BatchNorm2d)]
    if not rest:
        return "identity", {}
    if len(convs) == 1 and len(rest) == len(convs) + len(norms) and len(norms) <= 1:
        norm = str(norms[0].target) if norms else None
        return "projection", {"projection": str(convs[0].target), "projection_norm": norm}
    pads = [p for n in rest if (p := known.zero_channels_before(n)) is not None]
    slices = [n for n in rest if n.target is operator.getitem]
    if len(pads) == 1 and len(rest) == len(pads) + len(slices):
        return "pad", {"pad_before": pads[0]}
    return "other", {}


def _is_inside(path: str, owner: str) -> bool:
    return not owner or path == owner or path.startswith(owner + ".")


def _owner(flow: Flow, branch: _Branch) -> str:
    """Return the innermost module that holds the branch and is called on the block's input."""
    conv = str(branch.convs[0].target)
    for call in flow.calls:
        holds = call.path != conv and _is_inside(conv, call.path)
        if holds and branch.source in call.inputs and call.output not in branch.nodes:
            return call.path
    return ""


def _shortcut_module(flow: Flow, owner: str, branch: _Branch, end: fx.Node) -> str | None:
    """Return the outermost module inside owner that turns the block's input into the shortcut."""
    conv = str(branch.convs[0].target)
    found = None
    for call in flow.calls:
        maps = branch.source in call.inputs and call.output is end
        inside = call.path != owner and _is_inside(call.path, owner)
        if maps and inside and not _is_inside(conv, call.path):
            found = call.path
    return found


def _relu_behind(flow: Flow, add: fx.Node) -> fx.Node | None:
    """Return the ReLU that is the only reader of an add, None where there is none."""
    user = flow.only_user(add)
    found = known.activation(user, flow.module(user)) if user is not None else None
    return user if found is not None and found.name == "relu" else None


def _facts_of_whole(
    flow: Flow, owner: str, branch: _Branch, add: fx.Node, chain: list[fx.Node]
) -> dict:
    """Return the fields branch, activation, activation_name and whole of a block."""
    relu = _relu_behind(flow, add)
    last = relu or add
    order = branch.order[branch.order.index(branch.convs[0]) :]
    inside = {*order, *chain, add, last}
    places = [flow.nodes.index(node) for node in inside]
    calls = [c for c in flow.calls if c.path == owner]
    plain = all(n.op == "call_module" or known.activation(n, None).name == "relu" for n in order)
    alone = max(places) - min(places) + 1 == len(inside)
    whole = len(calls) == 1 and calls[0].output is last and calls[0].inputs == (branch.source,)
    is_module = relu is not None and relu.op == "call_module"
    return {
        "branch": tuple(str(n.target) if n.op == "call_module" else "" for n in order),
        "activation": "relu" if relu is not None else None,
        "activation_name": str(relu.target) if is_module else None,
        "whole": bool(owner) and plain and alone and whole,
    }


@dataclass
class _Read:
    """A block as read from the trace: its add, its branch, and its shortcut from end to source."""

    block: ResidualBlock
    add: fx.Node
    branch: _Branch
    shortcut: list[fx.Node]

    def takes(self, stop: fx.Node, before: fx.Node) -> bool:
        """True where a walk that ended at stop, coming from before, ended in this shortcut."""
        last = self.shortcut[0] if self.shortcut else self.branch.source
        return stop in self.shortcut or (stop is self.add and before is last)


def _read_block(flow: Flow, add: fx.Node) -> _Read | None:
    ends = [a for a in add.args[:2] if isinstance(a, fx.Node)]
    if len(ends) != 2 or len(add.args) > 2 or add.kwargs:
        return None
    for end, other in (ends, ends[::-1]):
        branch = _read_branch(flow, end)
        chain = _read_shortcut(flow, other, branch.source) if branch is not None else None
        if branch is None or chain is None:
            continue
        owner = _owner(flow, branch)
        kind, extra = _shortcut_kind(flow, chain)
        block = ResidualBlock(
            name=owner or str(branch.convs[-1].target),
            conv1=str(branch.convs[0].target),
            conv2=str(branch.convs[-1].target),
            norm2=str(branch.norm.target) if branch.norm is not None else None,
            shortcut=_shortcut_module(flow, owner, branch, other),
            shortcut_kind=kind,
            **extra,
            **_facts_of_whole(flow, owner, branch, add, chain),
        )
        return _Read(block, add, branch, chain)
    return None


def find_blocks(flow: Flow) -> tuple[tuple[ResidualBlock, ...], Callable]:
    """Return the residual blocks in execution order, and a function that explains stops.

    feeds(stops) names the blocks whose shortcuts the walk ended in; None where it ended elsewhere.
    """
    adds = [node for node in flow.nodes if known.is_add(node)]
    read = [found for add in adds if (found := _read_block(flow, add)) is not None]

    def feeds(stops: list) -> tuple[str, ...] | None:
        names = []
        for stop, before, _ in stops:
            fed = [r.block.name for r in read if r.takes(stop, before)]
            if not fed:
                return None
            names += fed
        return tuple(dict.fromkeys(names))

    blocks = []
    for r in read:
        channels = flow.module(r.branch.convs[-1]).out_channels
        found = reach(flow, r.add, channels, flat=False)
        fed = feeds(found.stops)
        closed = fed is not None and not found.is_output
        blocks.append(
            replace(r.block, consumers=tuple(found.followers), feeds=fed or (), closed=closed)
        )
    return tuple(blocks), feeds
