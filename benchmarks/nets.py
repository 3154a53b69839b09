"""Whole networks for benchmarks, in plain PyTorch, and random masks to prune them with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveweight.runs.models import LeNet5, LeNet300, initialize_


def vgg() -> nn.Module:
    """VGG-16 with BatchNorm at CIFAR shape: 13 convolutions 64..512, then 512-512-10."""
    layers: list[nn.Module] = []
    width = 3
    for repeats, channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(repeats):
            conv = nn.Conv2d(width, channels, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            width = channels
        layers.append(nn.MaxPool2d(2))
    head = [nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers, *head)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: identity, or 1x1 of stride 2 where the size halves."""

    def __init__(self, width: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride > 1:
            down = nn.Conv2d(width, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(down, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet20() -> nn.Module:
    """ResNet-20 at CIFAR shape (He et al., 2016), with projection shortcuts."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    layers += [nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for channels in (16, 32, 64):
        for _ in range(3):
            layers.append(ResidualBlock(width, channels, channels // width))
            width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Attention(nn.Module):
    """Multi-head self-attention over x [B, T, width] with four Linear projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A Transformer block; LayerNorm before each half (ViT) or after it (BERT)."""

    def __init__(self, width: int, heads: int, hidden: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.gelu, self.down = (
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, width),
        )

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class ViTTiny(nn.Module):
    """ViT-tiny (Touvron et al., 2021): 12 blocks, width 192, 3 heads; 64 patches of 8x8."""

    def __init__(self, size: int = 64, patch: int = 8, classes: int = 100) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2, 192) * 0.02)
        self.blocks = nn.Sequential(*(Block(192, 3, 768, norm_first=True) for _ in range(12)))
        self.norm = nn.LayerNorm(192)
        self.head = nn.Linear(192, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def encoder() -> nn.Module:
    """An encoder of MiniLM's size: 6 blocks, width 384, hidden 1536, 12 heads; no embedding."""
    return nn.Sequential(*(Block(384, 12, 1536, norm_first=False) for _ in range(6)))


@dataclasses.dataclass(frozen=True)
class Net:
    """How to build a net, the shape of one sample, the batches, and layers that stay dense."""

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    batches: tuple[int, int]
    granularities: tuple[str, ...]
    keep: tuple[str, ...]


NETS = {
    "LeNet-300-100": Net(LeNet300, (784,), (1, 32), ("weight",), ("classifier.5",)),
    "LeNet-5": Net(LeNet5, (1, 28, 28), (1, 32), ("kernel",), ("features.0", "classifier.3")),
    "VGG-like": Net(vgg, (3, 32, 32), (1, 32), ("kernel", "weight"), ("0", "47")),
    "ResNet-20": Net(resnet20, (3, 32, 32), (1, 32), ("kernel",), ("0", "14")),
    "ViT-tiny": Net(ViTTiny, (3, 64, 64), (1, 32), ("weight",), ("patches", "head")),
    "encoder": Net(encoder, (128, 384), (1, 16), ("weight",), ()),
}


def prune_randomly_(model: nn.Module, sparsity: float, granularity: str, keep: tuple) -> None:
    """Zero this share of each Linear and Conv2d: single weights, or whole kernels of a Conv2d."""
    generator = torch.Generator().manual_seed(1)
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or name in keep:
            continue
        weight = layer.weight.data
        whole = granularity == "kernel" and weight.dim() == 4
        places = weight.shape[:2] if whole else weight.shape
        score = torch.rand(places, generator=generator)
        drop = round(sparsity * score.numel())
        mask = torch.ones(score.numel())
        mask[score.flatten().argsort()[:drop]] = 0
        # Kept weights grow, so that activations stay of size one through a deep net.
        mask = mask.view(*places, 1, 1) if whole else mask.view(places)
        weight.mul_(mask).div_(max(1 - sparsity, 1e-3) ** 0.5)


def make(name: str, sparsity: float, granularity: str = "weight") -> nn.Module:
    """Build a net in eval mode with random weights, masks and BatchNorm statistics."""
    net = NETS[name]
    torch.manual_seed(0)
    model = initialize_(net.build()).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.8, 1.2)
            nn.init.uniform_(layer.running_var, 0.8, 1.2)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
    prune_randomly_(model, sparsity, granularity, net.keep)
    return model.requires_grad_(False)


def example(name: str, batch: int) -> Tensor:
    """Return a random input [batch, ...] of a net."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, *NETS[name].sample, generator=generator)
