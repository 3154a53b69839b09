"""SparseLinear: nn.Linear without the weights that are zero."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn

from liveweight.formats import NM, Bitmap, Block, Delta, SemiStructured, Unstructured
from liveweight.formats.block import GPU_COSTS
from liveweight.nn.sparse_module import SparseModule, find_format, read_dense
from liveweight.ops.activation import activation_code
from liveweight.ops.block_linear import apply_block
from liveweight.ops.few_tokens import apply_few_tokens
from liveweight.ops.semi_structured_linear import apply_semi_structured
from liveweight.ops.unstructured_linear import apply_unstructured

# A weight whose zeros form blocks is stored as blocks if so much of what they keep is not zero.
_BLOCKS_FIT = 0.9
# Below this density the columns of what is kept take fewer bytes as deltas than as a bitmap.
_DELTAS_FIT = 0.22
_HALVES = (torch.bfloat16, torch.float16)  # that the GPU kernels for single weights compute in
# Layouts of GPUs, by the format that they store.
GPU_LAYOUTS = MappingProxyType({"bitmap": "unstructured", "delta": "unstructured",
                                "semi_structured": "nm"})  # fmt: skip
_float32, _grad_enabled = torch.float32, torch.is_grad_enabled
_op = torch.ops.liveweight.unstructured_linear.default


class SparseLinear(SparseModule):
    """Weight-sparse (not activation-sparse) drop-in for nn.Linear: y = act(x W^T + b).

    x        [..., in_features]: on CPUs float32 or bfloat16, on GPUs bfloat16 or float16, blocks in
             float32 too (other dtypes run in plain PyTorch)
    returns  [..., out_features] like x

    values       Parameter: the kept weights, in the order of the format
    bias         Parameter [out_features] or None
    activation   None, "relu", "gelu" or "gelu_tanh", applied to the output
    batch_last   lay the output out with the samples of a feature side by side; values are the same
    parts        names of the modules that this one stands for, where several were joined

    Raises ValueError (shapes, names) and TypeError (types, dtypes).
    """

    formats = MappingProxyType(
        {
            "unstructured": Unstructured,
            "block": Block,
            "nm": NM,
            "bitmap": Bitmap,
            "delta": Delta,
            "semi_structured": SemiStructured,
        }
    )
    ops = MappingProxyType(
        {
            "unstructured": "unstructured_linear",
            "block": "block_linear",
            "nm": "unstructured_linear",
            "bitmap": "bitmap_linear",
            "delta": "delta_linear",
            "semi_structured": "semi_structured_linear",
        }
    )

    def __init__(
        self,
        weight: Unstructured | Block,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        batch_last: bool = False,
        parts: tuple[str, ...] = (),
    ) -> None:
        activation_code(activation)
        super().__init__(weight, bias, activation, parts)
        self.out_features, self.in_features = weight.shape
        self.batch_last = batch_last

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        format: str = "auto",
        *,
        activation: str | None = None,
        mask: Tensor | None = None,
        block: tuple[int, int] | None = None,
        samples: int | None = None,
    ) -> SparseLinear:
        """Return a module with the numbers of linear; zeros of its weight are not stored.

        format  "unstructured", "block", "nm" (2:4), or "auto": "block" where zeros form blocks,
                else "unstructured". Of a bfloat16 or float16 layer on a GPU, "unstructured" is
                stored as "bitmap" or, where little is kept, "delta", and "nm" as
                "semi_structured" ("auto" too where the zeros allow it): layouts that only GPUs
                have kernels for. They can be named as well
        mask    bool like weight: what is stored, zeros included; default: what is not zero
        block   (rows, columns) of a block for "block"; default: what stores the fewest zeros; on
                a GPU what should cost least for many samples (Block.best_block)
        samples  that calls mostly have, for "delta" (Delta.from_dense's tokens); default: 1

        Masks of torch.nn.utils.prune and mask buffers are applied first. The new module is in the
        mode (training or not) of linear and its tensors are copies.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"SparseLinear: expected an nn.Linear, got {type(linear).__name__}")
        weight = read_dense(linear, "weight")
        if format == "auto":
            kept = weight if mask is None else mask.to(weight.dtype)
            # Whether zeros form blocks; which blocks then cost least is another question.
            sizes = tuple(GPU_COSTS) if kept.is_cuda else None
            blocks_fit = block is not None or Block.best_block(kept, sizes)[1] >= _BLOCKS_FIT
            format = "block" if blocks_fit and bool((kept == 0).any()) else "unstructured"
            if format == "unstructured" and _on_gpu(kept) and fits_two_of_four(kept):
                format = "nm"
        format = layout_for(format, weight, mask)
        kind = find_format("SparseLinear", format, cls.formats)
        options = {}
        if kind is Block:
            kept = weight if mask is None else mask.to(weight.dtype)
            options["block"] = block if block is not None else Block.best_block(kept)[0]
        if kind is Delta and samples is not None:
            options["tokens"] = max(1, samples)
        packed = kind.from_dense(weight, mask, **options)
        module = cls(packed, read_dense(linear, "bias"), activation=activation)
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return act(x W^T + b) [..., out_features] for x [..., in_features]."""
        # Looked up in their dicts: nn.Module's attribute lookup costs a microsecond each.
        parameters, index = self._parameters, self._buffers
        values, bias = parameters["values"], parameters["bias"]
        code, shape = activation_code(self.activation), self.weight_shape
        if self.format == "block":
            pattern = (index["row_offsets"], index["columns"], index["schedule"])
            return apply_block(x, values, *pattern, shape, bias, code, self.batch_last)
        if self.format == "semi_structured":
            parts = (values, index["meta"], shape)
            return apply_semi_structured(x, *parts, bias, code, self.batch_last)
        if self.format in _FEW_TOKENS:
            names, sizes = _FEW_TOKENS[self.format]
            parts = (values, tuple(index[n] for n in names), tuple(self._size(n) for n in sizes))
            return apply_few_tokens(self.format, x, *parts, bias, code, self.batch_last)
        pattern = (index["columns"], index["segments"], index["offsets"], index["bits"])
        tile = self._fixed["tile"]
        plain = type(x) is Tensor and x.dtype is _float32 is values.dtype and not _grad_enabled()
        if plain and x.dim() > 1 and x.shape[-1] == shape[1] and x.is_contiguous():
            # What apply_unstructured would find out in microseconds: nothing is to be changed.
            flat = x if x.dim() == 2 else x.view(x.shape[:-1].numel(), shape[1])
            y = _op(flat, values, *pattern, tile, shape[0], bias, code, self.batch_last)
            return y if x.dim() == 2 else y.view(*x.shape[:-1], shape[0])
        return apply_unstructured(x, values, *pattern, tile, shape, bias, code, self.batch_last)

    def _size(self, name: str) -> object:
        return self.weight_shape if name == "shape" else self._fixed[name]

    def _backend(self) -> str:
        served = self.format != "block" or self.pack().block in GPU_COSTS
        if self.format in GPU_LAYOUTS:
            served = self.values.dtype in _HALVES
        return super()._backend() if served or not self.values.is_cuda else "reference"

    def extra_repr(self) -> str:
        """Sizes, sparsity, format and backend."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self._describe()}"


# Per format: the tensors beside the values, then the numbers, as the op takes them.
_FEW_TOKENS = {
    "bitmap": (("bits", "offsets"), ("shape", "most")),
    "delta": (("deltas", "starts", "order", "offsets"), ("shape", "layout")),
}


def _on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype in _HALVES


def layout_for(format: str, weight: Tensor, mask: Tensor | None = None) -> str:
    """Return the layout that stores a format where the weight is: another one on a GPU only."""
    if format not in GPU_LAYOUTS.values() or not _on_gpu(weight):
        return format
    if format == "nm":
        return "semi_structured"
    kept = int((weight if mask is None else mask).count_nonzero())
    return "delta" if kept < _DELTAS_FIT * weight.numel() else "bitmap"


def fits_two_of_four(weight: Tensor) -> bool:
    """Return whether a weight [N, K] keeps at most two of every four entries of a row."""
    kept = torch.nn.functional.pad(weight != 0, (0, -weight.shape[1] % 4))
    return not bool((kept.unflatten(1, (-1, 4)).sum(2) > 2).any())
