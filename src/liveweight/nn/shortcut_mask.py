"""ShortcutMask: which channels of a residual block's shortcut are kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShortcutMask(nn.Module):
    """Multiply the channels of a shortcut by a fixed 0/1 mask: y[n, c] = mask[c] x[n, c].

    mask   bool [C], a persistent buffer
    """

    channelwise = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(channels, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask.to(x.dtype).view(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"channels={self.mask.numel()}, kept={int(self.mask.sum())}"

    @classmethod
    def behind(cls, shortcut: nn.Module, channels: int, device: torch.device) -> nn.Sequential:
        """Return a shortcut with a mask of ones behind it, in the shortcut's mode."""
        return nn.Sequential(shortcut, cls(channels).to(device)).train(shortcut.training)


def shortcut_mask(module: nn.Module) -> ShortcutMask | None:
    """Return the mask that `behind` put behind a shortcut; None for any other module."""
    if type(module) is nn.Sequential and len(module) == 2 and isinstance(module[1], ShortcutMask):
        return module[1]
    return None
