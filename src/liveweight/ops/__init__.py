"""The ops: one file each with the public function, its checks, shape function and gradients."""

from liveweight.ops.kernelwise_conv2d import kernelwise_conv2d
from liveweight.ops.unstructured_linear import unstructured_linear

__all__ = ["kernelwise_conv2d", "unstructured_linear"]
