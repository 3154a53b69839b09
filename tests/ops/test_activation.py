"""Names, values and gradients of the activations; the compiled ones: tests/csrc/test_isa.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from liveweight.ops.activation import activation_code, activation_grad, apply_activation

MEANT = {
    None: lambda y: y,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
}


def test_codes_are_those_of_the_kernels():
    assert [activation_code(name) for name in (None, "relu", "gelu", "gelu_tanh")] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["", "tanh", 1, False, ["relu"]])
def test_other_names_are_errors(name):
    with pytest.raises(ValueError, match="activation must be None, 'relu', 'gelu' or 'gelu_tanh'"):
        activation_code(name)


@pytest.mark.parametrize("call", [apply_activation, lambda y, code: activation_grad(y, y, code)])
def test_other_codes_are_errors(call):
    with pytest.raises(ValueError, match="code must be 0, 1, 2 or 3, got 4"):
        call(torch.zeros(2), 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEANT)
def test_values_and_gradients(name, dtype):
    y = torch.linspace(-8, 8, 101, dtype=dtype, requires_grad=True)
    code = activation_code(name)
    wanted = MEANT[name](y)
    assert torch.equal(apply_activation(y, code), wanted)
    grad = torch.linspace(1, 2, 101, dtype=dtype)
    wanted.backward(grad)
    assert torch.equal(activation_grad(grad, y.detach(), code), y.grad)


def test_relu_needs_only_its_result():
    y = torch.tensor([-1.0, 0.0, 2.0])
    grad = torch.ones(3)
    assert activation_grad(grad, apply_activation(y, 1), 1).tolist() == [0.0, 0.0, 1.0]
