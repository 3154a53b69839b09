"""Residual blocks whose layers were replaced: the sum is written over the branch's output."""

from __future__ import annotations

from torch import nn

from liveweight import _graph
from liveweight.compress import edit
from liveweight.compress.chains import has_hooks
from liveweight.compress.replacement import Replacement
from liveweight.nn import Residual


class JoinedBlock:
    """One residual block in both forms; modules inside it are shared between them."""

    def __init__(self, model: nn.Module, name: str, new: Residual, conv: str) -> None:
        self.model, self.name, self.conv = model, name, conv
        self.old, self.new = model.get_submodule(name), new

    def apply(self) -> None:
        """Put the joined form in place."""
        edit.replace_module_(self.model, self.name, self.new)

    def undo(self) -> None:
        """Put the block back."""
        edit.replace_module_(self.model, self.name, self.old)


def join_blocks(
    model: nn.Module, graph: _graph.Graph | None, chosen: list[Replacement]
) -> list[JoinedBlock]:
    """Return the joined forms of the blocks whose last convolution was replaced."""
    replaced = {replacement.name for replacement in chosen}
    paths = edit.paths_by_module(model)
    found = []
    for block in graph.residual_blocks if graph is not None else ():
        if block.conv2 in replaced and block.whole and len(paths[_key(model, block.name)]) == 1:
            new = _join(model, block)
            found += [JoinedBlock(model, block.name, new, block.conv2)] if new else []
    return found


def _key(model: nn.Module, name: str) -> int:
    return id(model.get_submodule(name))


def _join(model: nn.Module, block: _graph.ResidualBlock) -> Residual | None:
    """Return the block's joined form, None where something would be lost or written over."""
    old = model.get_submodule(block.name)
    relu = model.get_submodule(block.activation_name) if block.activation_name else None
    if isinstance(old, Residual) or has_hooks(old) or (relu is not None and has_hooks(relu)):
        return None
    if block.shortcut is None and block.shortcut_kind != "identity":
        return None
    inner = [*filter(None, block.branch), *filter(None, [block.shortcut])]
    if any(not name.startswith(f"{block.name}.") for name in inner):
        return None
    if any(has_hooks(model.get_submodule(name)) for name in filter(None, block.branch)):
        return None  # a hook may keep the tensor that would be written over
    # What follows the last convolution must not hand on a view of something else.
    behind = block.branch[block.branch.index(block.conv2) + 1 :]
    if any(not isinstance(model.get_submodule(n), _FRESH) for n in filter(None, behind)):
        return None
    shortcut = block.shortcut[len(block.name) + 1 :] if block.shortcut else None
    if shortcut and _does_nothing(model.get_submodule(block.shortcut)):
        shortcut = None
    branch = [name[len(block.name) + 1 :] if name else "" for name in block.branch]
    try:
        return Residual(old, branch, shortcut, block.activation)
    except ValueError:
        return None


_FRESH = (nn.BatchNorm2d, nn.Identity)


def _does_nothing(module: nn.Module) -> bool:
    empty = isinstance(module, nn.Sequential) and len(module) == 0
    return (empty or type(module) is nn.Identity) and not has_hooks(module)
