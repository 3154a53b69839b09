"""Linear layer for few samples whose weight lacks single entries anywhere: y = act(x W^T + b)."""

from __future__ import annotations

from torch import Tensor

from liveweight import _library, reference
from liveweight.formats import Bitmap
from liveweight.ops.activation import activation_code
from liveweight.ops.few_tokens_grad import few_tokens_linear
from liveweight.ops.unstructured_linear import check_operands

_NAME = "bitmap_linear"


def bitmap_linear(
    x: Tensor, weight: Bitmap, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """Apply a weight-sparse linear layer: y = act(x W^T + b).

    x           [..., K]; on CUDA bfloat16 or float16, added up in fp32. Up to 64 samples the kernel
                reads the packed weight alone; for more it is expanded and multiplied densely
    weight      [N, K], values like x
    bias        [N] like x, or None
    activation  None, "relu", "gelu" or "gelu_tanh"
    returns     [..., N] like x

    Pruned weights count as zeros, as in a dense layer: inf and NaN of x reach every output of their
    sample. Differentiable once, in x, the values and the bias, at dense cost. The index values of
    weight are not checked here: Bitmap.from_dense and Bitmap.validate vouch for them.
    Raises ValueError (shapes, names) and TypeError (types, dtypes).
    """
    if not isinstance(weight, Bitmap):
        raise TypeError(f"{_NAME}: weight must be formats.Bitmap, got {type(weight).__name__}")
    code = activation_code(activation)
    values, (N, K) = weight.values, weight.shape
    x = check_operands(_NAME, x, values, weight.shape, bias)
    flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), K)
    index, sizes = (weight.bits, weight.offsets), (tuple(weight.shape), weight.most)
    y = few_tokens_linear("bitmap", flat.contiguous(), values, index, sizes, bias, code)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], N)


def _fake(x, values, bits, offsets, shape, most, bias, activation):
    return x.new_empty(x.shape[0], shape[0])


def _fake_dense(values, bits, offsets, shape, most):
    return values.new_empty(shape)


def _fake_grad_values(grad, x, values, bits, offsets, shape, most):
    return x.new_empty(values.shape[0])


_library.register(_NAME, reference.bitmap_linear, _fake)
_library.register("bitmap_to_dense", reference.bitmap_to_dense, _fake_dense)
_library.register(
    "bitmap_linear_grad_values", reference.bitmap_linear_grad_values, _fake_grad_values
)
