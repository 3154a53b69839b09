"""The ops: one file each with the public function, its checks, shape function and gradients."""

from liveweight.ops.activity_stats import activity_stats_, new_activity_stats
from liveweight.ops.bitmap_linear import bitmap_linear
from liveweight.ops.block_conv2d import block_conv2d
from liveweight.ops.block_linear import block_linear
from liveweight.ops.delta_linear import delta_linear, delta_to_dense
from liveweight.ops.kernelwise_conv2d import kernelwise_conv2d
from liveweight.ops.masked_linear import masked_linear, pack_mask_bits, unpack_mask_bits
from liveweight.ops.mass_mask import mass_mask
from liveweight.ops.nm_linear import nm_linear
from liveweight.ops.patch_gram import gram_norms_, patch_gram
from liveweight.ops.semi_structured_delta_linear import semi_structured_delta_linear
from liveweight.ops.signal_mask import signal_mask
from liveweight.ops.top_k_mask import top_k_mask
from liveweight.ops.unstructured_conv2d import unstructured_conv2d
from liveweight.ops.unstructured_linear import unstructured_linear

__all__ = [
    "activity_stats_",
    "bitmap_linear",
    "block_conv2d",
    "block_linear",
    "delta_linear",
    "delta_to_dense",
    "gram_norms_",
    "kernelwise_conv2d",
    "masked_linear",
    "mass_mask",
    "new_activity_stats",
    "nm_linear",
    "pack_mask_bits",
    "patch_gram",
    "semi_structured_delta_linear",
    "signal_mask",
    "top_k_mask",
    "unpack_mask_bits",
    "unstructured_conv2d",
    "unstructured_linear",
]
