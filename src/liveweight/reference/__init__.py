"""Every op in plain PyTorch: the truth for tests, and the kernel where no compiled one exists."""

from liveweight.reference.activation import apply_activation
from liveweight.reference.bitmap_linear import (
    bitmap_linear,
    bitmap_linear_grad_values,
    bitmap_to_dense,
)
from liveweight.reference.block_conv2d import (
    block_conv2d,
    block_conv2d_grad_values,
    block_conv2d_grad_x,
)
from liveweight.reference.block_linear import (
    block_linear,
    block_linear_grad_values,
    block_linear_grad_x,
)
from liveweight.reference.delta_linear import (
    delta_linear,
    delta_linear_grad_values,
    delta_to_dense,
)
from liveweight.reference.kernelwise_conv2d import (
    conv2d_size,
    kernelwise_conv2d,
    kernelwise_conv2d_grad_values,
    kernelwise_conv2d_grad_x,
)
from liveweight.reference.masked_linear import (
    masked_linear,
    masked_linear_grad_weight,
    masked_linear_grad_x,
    pack_mask_bits,
    unpack_mask_bits,
)
from liveweight.reference.patch_gram import gram_norms_, patch_gram
from liveweight.reference.scores import (
    activity_stats_,
    mass_mask,
    refused_signals,
    signal_mask,
    signals,
    split_signals,
    top_k_mask,
)
from liveweight.reference.semi_structured import (
    semi_structured_linear,
    semi_structured_pack,
    semi_structured_take,
    semi_structured_to_dense,
    semi_structured_torch_linear,
)
from liveweight.reference.unstructured_conv2d import (
    kernel_coordinates,
    lay_out,
    scatter_kernels,
    unstructured_conv2d,
    unstructured_conv2d_grad_values,
    unstructured_conv2d_grad_x,
)
from liveweight.reference.unstructured_linear import (
    unstructured_linear,
    unstructured_linear_grad_values,
    unstructured_linear_grad_x,
)

__all__ = [
    "activity_stats_",
    "apply_activation",
    "bitmap_linear",
    "bitmap_linear_grad_values",
    "bitmap_to_dense",
    "block_conv2d",
    "block_conv2d_grad_values",
    "block_conv2d_grad_x",
    "block_linear",
    "block_linear_grad_values",
    "block_linear_grad_x",
    "conv2d_size",
    "delta_linear",
    "delta_linear_grad_values",
    "delta_to_dense",
    "gram_norms_",
    "kernel_coordinates",
    "kernelwise_conv2d",
    "kernelwise_conv2d_grad_values",
    "kernelwise_conv2d_grad_x",
    "lay_out",
    "masked_linear",
    "masked_linear_grad_weight",
    "masked_linear_grad_x",
    "mass_mask",
    "pack_mask_bits",
    "patch_gram",
    "refused_signals",
    "scatter_kernels",
    "signal_mask",
    "signals",
    "split_signals",
    "top_k_mask",
    "semi_structured_linear",
    "semi_structured_pack",
    "semi_structured_take",
    "semi_structured_to_dense",
    "semi_structured_torch_linear",
    "unpack_mask_bits",
    "unstructured_conv2d",
    "unstructured_conv2d_grad_values",
    "unstructured_conv2d_grad_x",
    "unstructured_linear",
    "unstructured_linear_grad_values",
    "unstructured_linear_grad_x",
]
