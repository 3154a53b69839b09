"""Built-in models and the way to any other: a built-in name or "package.module:callable"."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import torch
from torch import nn

from liveweight._check import near_misses


def initialize_(model: nn.Module) -> nn.Module:
    """Draw every Linear and Conv2d weight from Kaiming's normal (gain of ReLU), biases to zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


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


MODELS: dict[str, Callable[..., nn.Module]] = {"lenet300": LeNet300, "lenet5": LeNet5}


def find_factory(name: str) -> Callable[..., nn.Module]:
    """Return the callable behind a built-in name or "package.module:callable" (or dotted path).

    ValueError: unknown name (with near misses), module that does not import, no such callable.
    """
    if name in MODELS:
        return MODELS[name]
    if ":" not in name and "." not in name:
        raise ValueError(
            f"model {name!r} is not built in: {near_misses(name, MODELS)} "
            "Other models: 'package.module:callable', for example 'torchvision.models:resnet18'"
        )
    module_name, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"model {name!r}: cannot import {module_name!r} ({error})") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [n for n in vars(module) if callable(getattr(module, n)) and n[0] != "_"]
        raise ValueError(
            f"model {name!r}: {module_name!r} has no callable {attribute!r}: "
            f"{near_misses(attribute, known)}"
        )
    return factory


def build_model(name: str, arguments: Mapping | None = None, seed: int | None = None) -> nn.Module:
    """Build a model from its name and keyword arguments; with a seed, always the same weights.

    ValueError: unknown name, arguments that the factory refuses. TypeError: not an nn.Module.
    """
    factory = find_factory(name)
    if seed is not None:
        torch.manual_seed(seed)
    try:
        model = factory(**(arguments or {}))
    except TypeError as error:
        raise ValueError(
            f"model {name!r} with arguments {dict(arguments or {})}: {error}"
        ) from None
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {name!r} gave a {type(model).__name__}, expected an nn.Module")
    return model
