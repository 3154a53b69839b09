"""Linear layer whose weight keeps at most n of every m entries along a row: y = act(x W^T + b)."""

from __future__ import annotations

from torch import Tensor

from liveweight.formats import NM
from liveweight.ops.activation import activation_code
from liveweight.ops.unstructured_linear import apply_unstructured


def nm_linear(
    x: Tensor,
    weight: NM,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    batch_last: bool = False,
) -> Tensor:
    """Apply a linear layer with an n:m sparse weight, as 2:4: y = act(x W^T + b).

    x           [..., K] float32 or bfloat16 (other dtypes, and devices without a kernel: plain
                PyTorch)
    weight      [N, K], values like x
    bias        [N] like x, or None
    activation  None, "relu", "gelu" or "gelu_tanh"
    batch_last  lay y out with the samples of a feature side by side, as unstructured_linear does
    returns     [..., N] like x

    Runs unstructured_linear's kernel: on a CPU a regular pattern is worth no other path.
    Differentiable once, in x, the values and the bias.
    Raises ValueError (shapes, names) and TypeError (types, dtypes).
    """
    if not isinstance(weight, NM):
        raise TypeError(f"nm_linear: weight must be formats.NM, got {type(weight).__name__}")
    parts = (weight.values, weight.columns, weight.segments, weight.offsets, weight.bits)
    code = activation_code(activation)
    return apply_unstructured(x, *parts, weight.tile, weight.shape, bias, code, batch_last)
