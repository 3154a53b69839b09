"""Linear layer whose weight is a 2:4 part and what that leaves: y = act(x W^T + b)."""

from __future__ import annotations

from torch import Tensor

from liveweight.formats import SemiStructuredDelta
from liveweight.ops.activation import activation_code, apply_activation
from liveweight.ops.delta_linear import delta_linear
from liveweight.ops.nm_linear import nm_linear


def semi_structured_delta_linear(
    x: Tensor,
    weight: SemiStructuredDelta,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """Apply a weight-sparse linear layer: y = act(x first^T + (x rest^T + b)).

    x           [..., K] bfloat16 or float16 on a GPU (other dtypes, and devices without a kernel:
                plain PyTorch)
    weight      [N, K], values like x
    bias        [N] like x, or None
    activation  None, "relu", "gelu" or "gelu_tanh"
    returns     [..., N] like x

    Both products are added up in fp32 and rounded to x's dtype, and so is their sum.
    Differentiable once, in x, both parts' values and the bias.
    Raises ValueError (shapes, names) and TypeError (types, dtypes).
    """
    if not isinstance(weight, SemiStructuredDelta):
        raise TypeError(
            "semi_structured_delta_linear: weight must be formats.SemiStructuredDelta, got "
            f"{type(weight).__name__}"
        )
    code = activation_code(activation)
    y = nm_linear(x, weight.first) + delta_linear(x, weight.rest, bias)
    return apply_activation(y, code)
