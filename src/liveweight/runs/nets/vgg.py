"""VGG for images of 32x32: 3x3 convolutions with BatchNorm, five pools, a small classifier."""

from __future__ import annotations

import torch
from torch import nn

from liveweight.runs.nets.initialize import initialize_

# Output channels of each convolution, "M" where a pool halves the map.
VGG13 = (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
VGG16 = (
    *(64, 64, "M", 128, 128, "M", 256, 256, 256, "M"),
    *(512, 512, 512, "M", 512, 512, 512, "M"),
)


class VGG(nn.Module):
    """Convolutions 3x3 (bias, BatchNorm, ReLU) by a plan, then hidden layers of 512 with dropout.

    x [N, channels, size, size] -> [N, classes]; size a multiple of 32.
    plan     output channels in order, "M" for a max pool of 2
    hidden   layers of 512 units in the classifier, each behind a dropout
    ValueError: size is not a multiple of 32. Source: Simonyan & Zisserman, 2015; with BatchNorm
    and the classifier of NNrelief's authors.
    """

    def __init__(
        self,
        plan: tuple[int | str, ...] = VGG16,
        hidden: int = 1,
        channels: int = 3,
        classes: int = 10,
        size: int = 32,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if size < 32 or size % 32:
            raise ValueError(f"VGG: size must be a multiple of 32, got {size}")
        layers: list[nn.Module] = []
        for step in plan:
            if step == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, step, 3, padding=1), nn.BatchNorm2d(step), nn.ReLU()]
            channels = step
        self.features = nn.Sequential(*layers)
        width, layers = channels * (size // 32) ** 2, [nn.Flatten()]
        for _ in range(hidden):
            layers += [nn.Dropout(dropout), nn.Linear(width, 512), nn.ReLU()]
            width = 512
        self.classifier = nn.Sequential(*layers, nn.Linear(width, classes))
        initialize_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def vgg_like(**arguments) -> VGG:
    """VGG-like: the 13 convolutions of VGG-16 and one hidden layer of 512; for images of 32x32."""
    return VGG(VGG16, hidden=1, **arguments)


def vgg13(**arguments) -> VGG:
    """VGG-13: ten convolutions and two hidden layers of 512; for images of 32x32."""
    return VGG(VGG13, hidden=2, **arguments)


def vgg16(**arguments) -> VGG:
    """VGG-16: thirteen convolutions and two hidden layers of 512; for images of 32x32."""
    return VGG(VGG16, hidden=2, **arguments)
