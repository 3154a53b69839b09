"""Where there is no GPU the kernels run in Triton's interpreter, with one fault of it repaired."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")


def _widen_bfloat16_products() -> None:
    """Multiply bfloat16 as numbers; the interpreter multiplies their bits, held in uint16."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
            bits = handle.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
        return handle

    def create_dot_of_numbers(self, a, b, d, *rest, **options):
        return create_dot(self, widened(a), widened(b), d, *rest, **options)

    interpreter.InterpreterBuilder.create_dot = create_dot_of_numbers


if not torch.cuda.is_available():
    _widen_bfloat16_products()


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU by way of the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _exact_convolutions():
    """Take float32 products of convolutions exactly: PyTorch's own setting allows TF32."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before
