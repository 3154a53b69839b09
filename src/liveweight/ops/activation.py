"""Names of the activations that an op can take into its kernel."""

from __future__ import annotations

from liveweight.reference.activation import (
    GELU,
    GELU_TANH,
    NONE,
    RELU,
    activation_grad,
    apply_activation,
)

__all__ = ["activation_code", "activation_grad", "apply_activation"]

_CODES = {None: NONE, "relu": RELU, "gelu": GELU, "gelu_tanh": GELU_TANH}


def activation_code(name: str | None) -> int:
    """Return the number by which kernels know an activation: None 0, "relu" 1, "gelu" 2,
    "gelu_tanh" 3.

    "gelu" is x Phi(x) with the normal distribution function Phi, "gelu_tanh" its approximation
    0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). Raises ValueError for other names.
    """
    code = _CODES.get(name) if name is None or isinstance(name, str) else None
    if code is None:
        known = ", ".join(map(repr, list(_CODES)[:-1]))
        raise ValueError(f"activation must be {known} or 'gelu_tanh', got {name!r}")
    return code
