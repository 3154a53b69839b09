"""A small convolutional network for spoken words."""

from __future__ import annotations

import torch
from torch import nn

from liveweight.runs.nets.initialize import initialize_


class SpeechCNN(nn.Module):
    """Three convolutions and two hidden fully connected layers over log-mel features.

    x [N, 1, bands, frames] -> [N, classes]; bands and frames >= 8. 154,890 weights by default.
    The shape of the acoustic models that hyper and hypo neurons were found in; sizes are ours.
    """

    def __init__(
        self,
        bands: int = 32,
        frames: int = 64,
        classes: int = 10,
        width: int = 8,
        hidden: int = 128,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if min(bands, frames) < 8:
            raise ValueError(f"SpeechCNN: bands and frames must be >= 8, got {bands} x {frames}")
        layers: list[nn.Module] = []
        for before, after in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(4 * width * (bands // 8) * (frames // 8), hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )
        initialize_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))
