"""What a call of prune_ is about to do: what every layer, BatchNorm and shortcut keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from liveweight._graph import Follower, Graph, Layer
from liveweight.prune.importances import LayerScore, Target
from liveweight.prune.mask import own_mask, set_mask_
from liveweight.prune.select import Keep


def alive_weights(target: Target) -> Tensor:
    """Return what earlier calls left of a layer's weights: bool, the shape of its scores."""
    mask = own_mask(target.module, "weight")
    if mask is None:
        return torch.ones(target.score_shape, dtype=torch.bool, device=target.module.weight.device)
    return mask if mask.shape == target.score_shape else mask.flatten(2).any(2)


def _alive(target: Target) -> Keep:
    """What earlier calls left of a layer, at the granularity of its scores."""
    weight, module = alive_weights(target), target.module
    if module.bias is None:
        return Keep(weight)
    bias = own_mask(module, "bias")
    return Keep(weight, torch.ones_like(module.bias, dtype=torch.bool) if bias is None else bias)


@dataclass
class Plan:
    """Keeps by layer name, kept BatchNorm entries by module name, kept shortcut channels by block.

    Keeps start as what earlier calls left; a bias entry exists wherever the layer has a bias.
    scored   scores of this call by layer name, 0 where earlier calls pruned; only under a structure
    values   new values of weights that were refitted, by layer name
    """

    model: nn.Module
    targets: dict[str, Target]
    keeps: dict[str, Keep] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    shortcuts: dict[str, Tensor] = field(default_factory=dict)
    scored: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keeps = {name: _alive(target) for name, target in self.targets.items()}

    def remember(self, scores: dict[str, LayerScore]) -> None:
        """Hold on to the scores, for the kept mass in the report."""
        for name, score in scores.items():
            self.scored[name] = torch.where(self.keeps[name].weight, score.weight, 0.0)

    def update(self, selected: dict[str, Keep]) -> None:
        """Tighten the keeps by what a selection rule returned."""
        for name, keep in selected.items():
            own = self.keeps[name]
            own.weight = own.weight & keep.weight
            if keep.bias is not None and own.bias is not None:
                own.bias = own.bias & keep.bias

    def drop_units(self, name: str, units: Tensor, norm: str | None = None) -> None:
        """Drop all connections and biases of some units (bool [out]), and their norm's entries."""
        if name in self.keeps:
            keep = self.keeps[name]
            keep.weight = keep.weight & ~units.view(-1, *[1] * (keep.weight.dim() - 1))
            keep.bias = None if keep.bias is None else keep.bias & ~units
        if norm is not None and units.any():
            kept = self.norms.get(norm, torch.ones_like(units))
            self.norms[norm] = kept & ~units

    def connections(self, name: str) -> Tensor:
        """Return which input channel reaches which unit: bool [out, in / groups]."""
        if name in self.keeps:
            keep = self.keeps[name].weight
        else:
            module = self.model.get_submodule(name)
            keep = own_mask(module, "weight")
            if keep is None:
                keep = torch.ones(
                    module.weight.shape[:2], dtype=torch.bool, device=module.weight.device
                )
        return keep.flatten(2).any(2) if keep.dim() > 2 else keep

    def reads(self, follower: Follower) -> Tensor:
        """Return which of a layer's channels a follower still reads: bool [channels]."""
        connections = self.connections(follower.name)
        groups = getattr(self.model.get_submodule(follower.name), "groups", 1)
        used = connections.unflatten(0, (groups, -1)).any(1).flatten()  # [in]
        return used.unflatten(0, (-1, follower.fan)).any(1)

    def full_mask(self, name: str) -> Tensor:
        """Return the kept weights of a layer in the weight's shape, earlier masks included."""
        module, keep = self.targets[name].module, self.keeps[name].weight
        keep = keep.view(*keep.shape, *[1] * (module.weight.dim() - keep.dim()))
        mask = own_mask(module, "weight")
        keep = keep.expand_as(module.weight)
        return keep if mask is None else keep & mask

    @torch.no_grad()
    def apply_(self, kinds: tuple[str, ...]) -> None:
        """Write the masks of layers of these kinds, and of all BatchNorms."""
        for name, target in self.targets.items():
            if target.kind not in kinds:
                continue
            if name in self.values:
                target.module.weight.copy_(self.values.pop(name))
            set_mask_(target.module, "weight", self.full_mask(name))
            bias = self.keeps[name].bias
            if bias is not None and not bias.all():
                set_mask_(target.module, "bias", bias)
        for name, kept in self.norms.items():
            _silence_norm_(self.model.get_submodule(name), kept)


def _silence_norm_(norm: nn.Module, kept: Tensor) -> None:
    """Make a BatchNorm answer exactly 0 for channels that are not kept."""
    for name in ("weight", "bias"):
        if norm._parameters.get(name) is not None:
            mask = own_mask(norm, name)
            set_mask_(norm, name, kept if mask is None else kept & mask)
    for name in ("running_mean", "running_var"):
        if norm._buffers.get(name) is not None:
            norm._buffers[name].masked_fill_(~kept, 0)


def drop_dead(plan: Plan, layer: Layer, alive: Tensor) -> None:
    """Drop the units of a layer that are 0 after the activation on every sample."""
    plan.drop_units(layer.name, ~alive, layer.norm)


def drop_unread(plan: Plan, graph: Graph, shortcuts: dict[str, Tensor]) -> None:
    """Drop units that nothing reads any more, last layer first.

    shortcuts   kept channels of every shortcut that has or can get a mask, by block name; changed
                in place where nothing reads a block's output channel
    """
    blocks = {block.conv2: block for block in graph.residual_blocks}
    by_name = {block.name: block for block in graph.residual_blocks}

    def fed(block_name: str, channels: int, device: torch.device) -> Tensor:
        block, kept = by_name[block_name], shortcuts.get(block_name)
        if kept is None or block.shortcut_kind not in ("identity", "pad"):
            return torch.ones(channels, dtype=torch.bool, device=device)
        return kept[block.pad_before : block.pad_before + channels]

    for name, layer in reversed(graph.layers.items()):
        block = blocks.get(name)
        end = block or layer
        # A layer's feeds complete its followers; a block counts them in closed.
        closed = end.closed or (block is None and bool(end.feeds))
        if layer.is_output or not closed or name not in plan.keeps:
            continue
        followers = block.consumers if block else layer.followers
        device = plan.keeps[name].weight.device
        reads = [plan.reads(f) for f in followers]
        reads += [fed(b, layer.channels, device) for b in end.feeds]
        if not reads:
            continue
        unread = ~torch.stack(reads).any(0)
        plan.drop_units(name, unread, block.norm2 if block else layer.norm)
        if block is not None:
            if block.projection is not None:
                plan.drop_units(block.projection, unread, block.projection_norm)
            elif block.name in shortcuts:
                shortcuts[block.name] &= ~unread
