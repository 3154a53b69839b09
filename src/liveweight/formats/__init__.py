"""What a sparse weight is: frozen values with from_dense, to_dense and validate."""

from liveweight.formats.bitmap import Bitmap
from liveweight.formats.block import Block
from liveweight.formats.block_kernels import BlockKernels
from liveweight.formats.delta import Delta
from liveweight.formats.kernelwise import Kernelwise
from liveweight.formats.nm import NM
from liveweight.formats.semi_structured import SemiStructured
from liveweight.formats.semi_structured_delta import SemiStructuredDelta
from liveweight.formats.unstructured import Unstructured
from liveweight.formats.unstructured_kernels import UnstructuredKernels

__all__ = [
    "NM",
    "Bitmap",
    "Block",
    "BlockKernels",
    "Delta",
    "Kernelwise",
    "SemiStructured",
    "SemiStructuredDelta",
    "Unstructured",
    "UnstructuredKernels",
]
