"""Layer shapes from named models, and pruned weights to go with them; the only copy."""

from __future__ import annotations

import torch
from torch import Tensor

# name: (out_features, in_features)
LINEAR = {
    "lenet300.fc1": (300, 784),
    "lenet5.fc1": (500, 800),
    "minilm.ffn": (1536, 384),
    "square-1024": (1024, 1024),
    "square-4096": (4096, 4096),
}

# name: (in_channels, out_channels, kernel, height = width, stride, padding)
CONV = {
    "lenet5.conv1": (1, 20, 5, 28, 1, 0),
    "lenet5.conv2": (20, 50, 5, 12, 1, 0),
    "vgg.conv2": (64, 64, 3, 32, 1, 1),
    "vgg.conv7": (256, 256, 3, 8, 1, 1),
    "resnet20.down": (16, 32, 3, 32, 2, 1),
}


def pruned_linear(rows: int, columns: int, sparsity: float, seed: int = 0) -> Tensor:
    """Return a Gaussian weight [rows, columns] whose smallest magnitudes are zero."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return _zero_smallest(weight, weight.abs(), sparsity)


def pruned_conv(out: int, inp: int, kernel: int, sparsity: float, seed: int = 0) -> Tensor:
    """Return a Gaussian weight [out, inp, kernel, kernel] whose weakest kernels are zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, kernel, kernel, generator=generator)
    return _zero_smallest(weight, weight.norm(dim=(2, 3), keepdim=True), sparsity)


def prune_weights(shape: tuple[int, ...], sparsity: float, seed: int = 0) -> Tensor:
    """Return a Gaussian weight of any shape whose smallest magnitudes are zero."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return _zero_smallest(weight, weight.abs(), sparsity)


def _zero_smallest(weight: Tensor, score: Tensor, sparsity: float) -> Tensor:
    drop = int(sparsity * score.numel())
    if drop:
        weight = weight * (score > score.flatten().kthvalue(drop).values)
    return weight
