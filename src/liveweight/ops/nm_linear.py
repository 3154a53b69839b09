"""Linear layer whose weight keeps at most n of every m entries along a row: y = act(x W^T + b)."""

from __future__ import annotations

from torch import Tensor

from liveweight.formats import NM, SemiStructured
from liveweight.ops.activation import activation_code
from liveweight.ops.semi_structured_linear import apply_semi_structured
from liveweight.ops.unstructured_linear import apply_unstructured


def nm_linear(
    x: Tensor,
    weight: NM | SemiStructured,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    batch_last: bool = False,
) -> Tensor:
    """Apply a linear layer with an n:m sparse weight, as 2:4: y = act(x W^T + b).

    x           [..., K] float32, bfloat16 or float16 (what a device has no kernel for: plain
                PyTorch)
    weight      [N, K], values like x. NM runs unstructured_linear's kernel: on a CPU a regular
                pattern is worth no other path. SemiStructured (2:4) is for sparse tensor cores,
                bfloat16 and float16: the package's kernel for up to 64 tokens, PyTorch's
                cuSPARSELt or CUTLASS backend for more
    bias        [N] like x, or None
    activation  None, "relu", "gelu" or "gelu_tanh"
    batch_last  lay y out with the samples of a feature side by side, as unstructured_linear does
    returns     [..., N] like x

    Differentiable once, in x, the values and the bias.
    Raises ValueError (shapes, names) and TypeError (types, dtypes).
    """
    code = activation_code(activation)
    if isinstance(weight, SemiStructured):
        parts = (weight.values, weight.meta, weight.shape)
        return apply_semi_structured(x, *parts, bias, code, batch_last)
    if not isinstance(weight, NM):
        raise TypeError(
            "nm_linear: weight must be formats.NM or formats.SemiStructured, got "
            f"{type(weight).__name__}"
        )
    parts = (weight.values, weight.columns, weight.segments, weight.offsets, weight.bits)
    return apply_unstructured(x, *parts, weight.tile, weight.shape, bias, code, batch_last)
