"""The LeNets: a perceptron and a small convolutional net."""

from __future__ import annotations

import torch
from torch import nn

from liveweight.runs.nets.initialize import initialize_


class LeNet300(nn.Module):
    """LeNet-300-100: a perceptron with two hidden layers; 266,610 weights at 784 inputs.

    x [N, ...] with `features` values per sample -> [N, classes]. Source: LeCun et al., 1998.
    """

    def __init__(self, features: int = 784, classes: int = 10) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(features, 300),
            nn.ReLU(),
            nn.Linear(300, 100),
            nn.ReLU(),
            nn.Linear(100, classes),
        )
        initialize_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(x)


class LeNet5(nn.Module):
    """LeNet-5 in Caffe's sizes (20-50-500); 431,080 weights at 1x28x28.

    x [N, channels, size, size] -> [N, classes]; size >= 16. Source: LeCun et al., 1998; Caffe.
    """

    def __init__(self, channels: int = 1, classes: int = 10, size: int = 28) -> None:
        super().__init__()
        side = ((size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"LeNet5: size must be at least 16, got {size}")
        self.features = nn.Sequential(
            nn.Conv2d(channels, 20, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(50 * side * side, 500),
            nn.ReLU(),
            nn.Linear(500, classes),
        )
        initialize_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))
