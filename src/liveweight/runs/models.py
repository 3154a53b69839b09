"""Built-in models and the way to any other: a built-in name or "package.module:callable"."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import torch
from torch import nn

from liveweight._check import near_misses
from liveweight.runs.nets import resnet, vgg
from liveweight.runs.nets.initialize import initialize_
from liveweight.runs.nets.lenet import LeNet5, LeNet300
from liveweight.runs.nets.speech import SpeechCNN
from liveweight.runs.nets.vit import ViT

__all__ = ["MODELS", "LeNet5", "LeNet300", "build_model", "find_factory", "initialize_"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet300": LeNet300,
    "lenet5": LeNet5,
    "vgg-like": vgg.vgg_like,
    "vgg13": vgg.vgg13,
    "vgg16": vgg.vgg16,
    "resnet20": resnet.resnet20,
    "resnet56": resnet.resnet56,
    "speech-cnn": SpeechCNN,
    "vit4": ViT,
}


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
