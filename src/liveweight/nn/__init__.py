"""Drop-in modules for nn.Linear and nn.Conv2d, computed sparse or packed; TokenMerge for ViTs."""

from liveweight.nn.by_batch import ByBatch
from liveweight.nn.packed_conv2d import PackedConv2d
from liveweight.nn.packed_linear import PackedLinear
from liveweight.nn.residual import Residual
from liveweight.nn.shortcut_mask import ShortcutMask
from liveweight.nn.sparse_conv2d import SparseConv2d
from liveweight.nn.sparse_linear import SparseLinear
from liveweight.nn.token_merge import TokenMerge

__all__ = [
    "ByBatch",
    "PackedConv2d",
    "PackedLinear",
    "Residual",
    "ShortcutMask",
    "SparseConv2d",
    "SparseLinear",
    "TokenMerge",
]
