"""Activations that ops fuse behind their sum, by number, with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

NONE, RELU, GELU, GELU_TANH = range(4)  # csrc/cpu/activation.h numbers them the same
_APPROXIMATE = {GELU: "none", GELU_TANH: "tanh"}


def apply_activation(y: Tensor, code: int) -> Tensor:
    """Return act(y): y itself for 0, max(y, 0) for 1, exact GELU for 2, its tanh form for 3.

    Raises ValueError for other codes.
    """
    if code == NONE:
        return y
    if code == RELU:
        return functional.relu(y)
    _check(code)
    return functional.gelu(y, approximate=_APPROXIMATE[code])


def activation_grad(grad: Tensor, before: Tensor, code: int) -> Tensor:
    """Return grad * act'(before), like grad.

    before is what the activation was given; ReLU may be given its own result instead.
    Raises ValueError for codes outside 0..3.
    """
    if code == NONE:
        return grad
    if code == RELU:
        return torch.ops.aten.threshold_backward(grad, before, 0)
    _check(code)
    return torch.ops.aten.gelu_backward(grad, before, approximate=_APPROXIMATE[code])


def _check(code: int) -> None:
    if code not in _APPROXIMATE:
        raise ValueError(f"activation code must be 0, 1, 2 or 3, got {code}")
