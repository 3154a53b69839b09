"""Residual nets for images of 32x32, with shortcuts that have no weights (option A)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from liveweight.runs.nets.initialize import initialize_

WIDTHS = (16, 32, 64)


class PadShortcut(nn.Module):
    """Every other row and column, between zero channels: [N, C, H, W] -> [N, C + 2 pad, H/2, W/2].

    Option A of He et al., 2016. A module of its own, so that tracing keeps it by name and its
    channels can be masked.
    """

    traced_inside = True  # for symbolic tracing: a module of a user's net, not one of ours

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))

    def extra_repr(self) -> str:
        return f"pad={self.pad}"


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), convolutions 3x3 without bias.

    x [N, before, H, W] -> [N, width, H / stride, W / stride]; stride 2 where the width doubles.
    """

    traced_inside = True

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 else PadShortcut((width - before) // 2)
        self.relu2 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.conv1(x)
        branch = self.relu1(self.bn1(branch))
        branch = self.bn2(self.conv2(branch))
        return self.relu2(branch + self.shortcut(x))


class ResNet(nn.Module):
    """Residual net of 6 blocks + 2 layers: three stages of 16, 32 and 64 channels, then a mean.

    x [N, channels, H, W] -> [N, classes]; blocks: per stage. ValueError: blocks below 1.
    Source: He et al., 2016, section 4.2.
    """

    def __init__(self, blocks: int, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"ResNet: blocks must be 1 or more, got {blocks}")
        before = WIDTHS[0]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, before, 3, 1, 1, bias=False), nn.BatchNorm2d(before), nn.ReLU()
        )
        stages = []
        for width in WIDTHS:
            steps = [1 if width == before else 2] + [1] * (blocks - 1)
            sizes = [before] + [width] * (blocks - 1)
            pairs = zip(sizes, steps, strict=True)
            stages.append(nn.Sequential(*(BasicBlock(n, width, stride) for n, stride in pairs)))
            before = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
        initialize_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)))


def resnet20(**arguments) -> ResNet:
    """ResNet-20: three blocks per stage, option-A shortcuts; for images of 32x32."""
    return ResNet(3, **arguments)


def resnet56(**arguments) -> ResNet:
    """ResNet-56: nine blocks per stage, option-A shortcuts; for images of 32x32."""
    return ResNet(9, **arguments)
