"""What the launchers share: the device's capability, the way of products, checks of operands."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up; triton.cdiv takes microseconds when called from the host."""
    return -(-a // b)


def arch_of(x: Tensor) -> int:
    """Return the compute capability of x's device, 80 for 8.0."""
    if not x.is_cuda:  # Triton's interpreter
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def precision(dtype: torch.dtype) -> str:
    """Return Triton's name of the way products of this dtype are taken.

    float32 takes three TF32 products ("tf32x3", about float32's accuracy), or one where PyTorch's
    matrix products may: torch.set_float32_matmul_precision("high"), or
    torch.backends.cuda.matmul.fp32_precision = "tf32". Other dtypes do not mind.
    """
    # Reading it the older way raises once a user has set it the newer way; this knows both.
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if dtype == torch.float32 and exact else "tf32"


def conv_precision(dtype: torch.dtype) -> str:
    """Return Triton's name of the way a convolution's products of this dtype are taken.

    As precision does, by PyTorch's own setting for convolutions, which allows one TF32 product
    unless it is told otherwise: torch.backends.cudnn.allow_tf32 = False, or
    torch.backends.cudnn.conv.fp32_precision = "ieee".
    """
    exact = torch.backends.cudnn.conv.fp32_precision != "tf32"
    return "tf32x3" if dtype == torch.float32 and exact else "tf32"


def check_operand(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype
) -> None:
    """Raise unless tensor is contiguous, of this shape and dtype, and on the device of like."""
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: expected {name} {_name(dtype)}, got {_name(tensor.dtype)}")
    if tensor.shape != shape or not tensor.is_contiguous() or tensor.device != like.device:
        raise ValueError(
            f"{op}: expected {name} contiguous {shape} on {like.device}, got "
            f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )


def check_dtype(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless the kernels know the dtype of tensor."""
    if tensor.dtype not in DTYPES:
        known = ", ".join(map(_name, DTYPES))
        raise TypeError(f"{op}: expected {name} {known}, got {_name(tensor.dtype)}")


def tma_reads(tensor: Tensor) -> bool:
    """Return whether TMA can read rows of tensor: it wants 16-byte places."""
    aligned = tensor.data_ptr() % 16 == 0
    return aligned and tensor.shape[-1] * tensor.element_size() % 16 == 0


def parts_of(most: int, steps: int) -> int:
    """Return into how many parts a sum of so many steps is cut: a power of two, most at most.

    Every number is a compilation of its own.
    """
    return 1 << (max(min(most, steps), 1).bit_length() - 1)


def align_rows(x: Tensor, side: int) -> Tensor:
    """Return x [M, n], or a copy with rows padded with zeros to a multiple of side, 16 or more.

    A row of other than a multiple of 16 numbers, or a tensor that does not begin at 16 bytes, can
    only be read a number at a time; the copy costs less.
    """
    if x.shape[1] % 16:
        return functional.pad(x, (0, -x.shape[1] % side))
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
