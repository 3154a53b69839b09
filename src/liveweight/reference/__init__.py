"""Every op in plain PyTorch: the truth for tests, and the kernel where no compiled one exists."""

from liveweight.reference.kernelwise_conv2d import (
    conv2d_size,
    kernelwise_conv2d,
    kernelwise_conv2d_grad_values,
    kernelwise_conv2d_grad_x,
)
from liveweight.reference.masked_linear import masked_linear, unpack_mask_bits
from liveweight.reference.scores import activity_stats_, mass_mask
from liveweight.reference.unstructured_linear import (
    unstructured_linear,
    unstructured_linear_grad_values,
    unstructured_linear_grad_x,
)

__all__ = [
    "activity_stats_",
    "conv2d_size",
    "kernelwise_conv2d",
    "kernelwise_conv2d_grad_values",
    "kernelwise_conv2d_grad_x",
    "masked_linear",
    "mass_mask",
    "unpack_mask_bits",
    "unstructured_linear",
    "unstructured_linear_grad_values",
    "unstructured_linear_grad_x",
]
