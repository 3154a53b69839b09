"""Residual blocks under NNrelief: weigh the branch of convolutions against the shortcut."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liveweight._graph import ResidualBlock
from liveweight.nn import ShortcutMask
from liveweight.prune.activity import Activity, Watch
from liveweight.prune.plan import Plan


def find_shortcut_mask(model: nn.Module, block: ResidualBlock) -> ShortcutMask | None:
    """Return the mask that an earlier call attached to a block's shortcut."""
    if block.shortcut is None:
        return None
    return next(
        (m for m in model.get_submodule(block.shortcut).modules() if isinstance(m, ShortcutMask)),
        None,
    )


def attach_shortcut_mask_(model: nn.Module, block: ResidualBlock, kept: Tensor) -> None:
    """Set a block's shortcut mask; the first time, wrap the module in Sequential with a mask."""
    mask = find_shortcut_mask(model, block)
    if mask is None:
        parent_name, _, name = block.shortcut.rpartition(".")
        old = model.get_submodule(block.shortcut)
        wrapped = ShortcutMask.behind(old, kept.numel(), kept.device)
        setattr(model.get_submodule(parent_name), name, wrapped)
        mask = wrapped[1]
    mask.mask.copy_(kept)


def can_mask_shortcut(block: ResidualBlock) -> bool:
    """True for identity and padding shortcuts that are modules; a projection is a conv instead."""
    return block.shortcut is not None and block.shortcut_kind in ("identity", "pad")


def watches(model: nn.Module, block: ResidualBlock) -> list[Watch]:
    """Return what must be seen of a block: the branch after its BatchNorm, and the shortcut."""
    branch = model.get_submodule(block.norm2 or block.conv2)
    found = [Watch(f"{block.conv2} (branch)", branch, "output", Activity("conv"))]
    if block.shortcut is not None:
        shortcut, where = model.get_submodule(block.shortcut), "output"
    elif block.shortcut_kind == "identity":
        shortcut, where = model.get_submodule(block.conv1), "input"
    elif block.projection is not None:
        shortcut, where = model.get_submodule(block.projection_norm or block.projection), "output"
    else:
        return []
    return [*found, Watch(f"{block.conv2} (shortcut)", shortcut, where, Activity("conv"))]


def weigh(branch: Tensor, shortcut: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return which channels of the branch and of the shortcut to cut: bool [C] each.

    branch, shortcut   [C, H, W] mean absolute maps; A_c and R_c are their Frobenius norms
    cut the branch     where A / (A + R) < 1 - alpha
    cut the shortcut   where R / (A + R) < 1 - alpha
    """
    a, r = branch.flatten(1).norm(dim=1), shortcut.flatten(1).norm(dim=1)
    floor = (1.0 - alpha) * (a + r)
    return a < floor, r < floor


def apply_rule(
    plan: Plan, block: ResidualBlock, branch: Tensor, shortcut: Tensor, alpha: float
) -> str:
    """Cut what holds less than 1 - alpha of a channel's sum; return a note, "" where all is done.

    A cut branch loses all kernels of that filter of its last convolution, its bias, and its
    BatchNorm entries (without the last, the shift would go on as a constant). A projection
    shortcut is never cut.
    """
    cut_branch, cut_shortcut = weigh(branch, shortcut, alpha)
    if block.conv2 in plan.keeps:
        plan.drop_units(block.conv2, cut_branch, block.norm2)
    if not cut_shortcut.any():
        return ""
    if can_mask_shortcut(block):
        kept = plan.shortcuts.get(block.name, torch.ones_like(cut_shortcut))
        plan.shortcuts[block.name] = kept & ~cut_shortcut
        return ""
    why = "a projection" if block.projection is not None else "not a module that could be masked"
    return (
        f"block '{block.name}': {int(cut_shortcut.sum())} shortcut channels hold less than "
        f"1 - alpha; shortcut kept: it is {why}"
    )
