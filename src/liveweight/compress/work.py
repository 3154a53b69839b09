"""What one call of a layer has to do: the counts that its time is predicted from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Blocks that a "block" weight is counted in before its format has been built.
_BLOCK = (16, 16)


@dataclass(frozen=True)
class Work:
    """Counts of one call.

    kind       "linear", "conv" or "pointwise" (a 1x1 convolution)
    rows       rows of a Linear's input; samples of a convolution's
    plane      output positions of one sample; 1 for a Linear
    stored     weights that the format stores and multiplies with
    weights    all weights, zeros included
    out_bytes  of the output
    """

    kind: str
    rows: int
    plane: int
    stored: int
    weights: int
    out_bytes: int

    @property
    def flops(self) -> float:
        """2 x stored weights x positions."""
        return 2.0 * self.stored * self.rows * self.plane

    @property
    def features(self) -> tuple[float, float, float]:
        """What the speed of a format depends on most, on logarithmic scales."""
        density = max(self.stored, 1) / max(self.weights, 1)
        return math.log2(max(self.rows, 1)), math.log2(max(self.plane, 1)) / 2, math.log2(density)


def stored_weights(weight: Tensor, name: str) -> int:
    """Return how many weights a format of this name stores of a dense weight."""
    kept = weight.detach().ne(0)
    if name == "kernelwise":
        return int(kept.flatten(2).any(2).sum()) * weight[0, 0].numel()
    if name == "block" and weight.dim() == 2:
        rows, columns = _BLOCK
        pad = (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
        padded = nn.functional.pad(kept, pad)
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).any(3).any(1)
        return int(blocks.sum()) * rows * columns
    return weight.numel() if name.startswith("dense") else int(kept.sum())


@torch.no_grad()
def work_of(layer: nn.Module, name: str, x: Tensor) -> Work:
    """Return the work of a Linear or Conv2d in a format ("dense": as it is) on an input."""
    weight = layer.weight
    stored, size = stored_weights(weight, name), weight.element_size()
    if isinstance(layer, nn.Linear):
        rows = x.numel() // max(1, layer.in_features)
        bytes_out = rows * layer.out_features * size
        return Work("linear", rows, 1, stored, weight.numel(), bytes_out)
    plane = math.prod(_output_sizes(layer, x))
    rows = x.shape[0] if x.dim() == 4 else 1
    kind = "pointwise" if weight[0, 0].numel() == 1 else "conv"
    bytes_out = rows * layer.out_channels * plane * size
    return Work(kind, rows, plane, stored, weight.numel(), bytes_out)


def _output_sizes(layer: nn.Conv2d, x: Tensor) -> list[int]:
    sizes = []
    for axis in (0, 1):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        if layer.padding == "same":
            pad = reach
        else:
            pad = 0 if layer.padding == "valid" else 2 * layer.padding[axis]
        sizes.append((x.shape[axis - 2] + pad - reach - 1) // layer.stride[axis] + 1)
    return sizes
