"""Drop-in modules for nn.Linear and nn.Conv2d whose weight is stored and computed sparse."""

from liveweight.nn.sparse_conv2d import SparseConv2d
from liveweight.nn.sparse_linear import SparseLinear

__all__ = ["SparseConv2d", "SparseLinear"]
