"""How the numbers of a picture [B, C, H, W] lie in memory, for ops that read and write three ways.

contiguous (0)     sample, channel, row, column: PyTorch's own
channels_last (1)  sample, row, column, channel: torch.channels_last
batch_last (2)     channel, row, column, sample: samples side by side

Shapes and values never change, only strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CONTIGUOUS, CHANNELS_LAST, BATCH_LAST = 0, 1, 2
LAYOUTS = {"contiguous": CONTIGUOUS, "channels_last": CHANNELS_LAST, "batch_last": BATCH_LAST}


def find_layout(x: Tensor) -> int | None:
    """Return the layout of x [B, C, H, W], the first that fits where several do; None: another."""
    if x.is_contiguous():
        return CONTIGUOUS
    if x.is_contiguous(memory_format=torch.channels_last):
        return CHANNELS_LAST
    return BATCH_LAST if x.permute(1, 2, 3, 0).is_contiguous() else None


def empty_in(like: Tensor, shape: Sequence[int], layout: int) -> Tensor:
    """Return an uninitialised tensor [B, C, H, W] in that layout, dtype and device of `like`."""
    b, c, h, w = shape
    if layout == CHANNELS_LAST:
        return like.new_empty(b, h, w, c).permute(0, 3, 1, 2)
    if layout == BATCH_LAST:
        return like.new_empty(c, h, w, b).permute(3, 0, 1, 2)
    return like.new_empty(b, c, h, w)


def lay_out(x: Tensor, layout: int) -> Tensor:
    """Return x [B, C, H, W] in that layout: a copy, or x where it lies so already."""
    if layout == CONTIGUOUS:
        return x.contiguous()
    return empty_in(x, x.shape, layout).copy_(x)
