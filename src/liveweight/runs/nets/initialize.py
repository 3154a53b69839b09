"""First weights of the built-in models."""

from __future__ import annotations

from torch import nn


def initialize_(model: nn.Module) -> nn.Module:
    """Draw every Linear and Conv2d weight from Kaiming's normal (gain of ReLU), biases to zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
