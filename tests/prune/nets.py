"""Small models for the tests of this folder, handed out by the fixture `nets`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class LeNet300(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Sequential(
            nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )

    def forward(self, x):
        return self.classifier(x.view(x.size(0), -1))


class LeNet5(nn.Module):
    def __init__(self):
        super().__init__()
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))

    def forward(self, x):
        return self.classifier(torch.flatten(self.feature_extractor(x), 1))


class Mlp(nn.Sequential):
    def __init__(self, *sizes):
        layers = []
        for a, b in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(a, b), nn.ReLU()]
        super().__init__(*layers[:-1])


class ConvNet(nn.Module):
    """conv - BN - ReLU - pool - conv - ReLU - flatten - Linear - Linear on [N, 3, 8, 8]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3)
        self.fc1 = nn.Linear(20, 7)
        self.fc2 = nn.Linear(7, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.conv2(x)).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


class PadShortcut(nn.Module):
    def __init__(self, before):
        super().__init__()
        self.before = before

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.before))


class Block(nn.Module):
    def __init__(self, cin, cout, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = shortcut

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, identity block, padding block (4 -> 8 channels, stride 2), projection block, head."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1)
        self.block1 = Block(4, 4, 1, nn.Sequential())
        self.block2 = Block(4, 8, 2, PadShortcut(2))
        self.block3 = Block(8, 8, 2, nn.Sequential(nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8)))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(F.relu(self.conv1(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def state_of(model):
    """Everything a failed or dry verb must leave alone: values, types of modules, modes, hooks."""
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    modules = [(n, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
               for n, m in model.named_modules()]  # fmt: skip
    return tensors, modules, [id(p) for p in model.parameters()]


def same_state(before, after):
    same = before[0].keys() == after[0].keys() and before[1:] == after[1:]
    return same and all(
        torch.allclose(v, after[0][k], rtol=0, atol=0, equal_nan=True) for k, v in before[0].items()
    )
