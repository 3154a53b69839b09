"""SparseConv2d: nn.Conv2d without the 2-D kernels that are zero."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn

from liveweight.formats import Kernelwise, UnstructuredKernels
from liveweight.nn.sparse_module import SparseModule, find_format, read_dense
from liveweight.ops.kernelwise_conv2d import apply_kernelwise, check_pool, make_pair
from liveweight.ops.layout import layout_code
from liveweight.ops.unstructured_conv2d import apply_unstructured_conv
from liveweight.ops.unstructured_linear import check_activation
from liveweight.reference.layouts import find_layout

Pair = tuple[int, int]
# Kernels of which so many entries are not zero are stored whole.
_KERNELS_FIT = 0.7
_float32, _grad_enabled = torch.float32, torch.is_grad_enabled
_ops = {
    "kernelwise": torch.ops.liveweight.kernelwise_conv2d.default,
    "unstructured": torch.ops.liveweight.unstructured_conv2d.default,
}


class SparseConv2d(SparseModule):
    """Weight-sparse (not activation-sparse) drop-in for nn.Conv2d: y = pool(act(conv2d(x, W) + b)).

    x        [B, in_channels, H, W] or [in_channels, H, W] float32 (other dtypes: plain PyTorch)
    returns  [B, out_channels, H', W'] or [out_channels, H', W'] like x

    values          Parameter: the kept kernels or weights, in the order of the format
    bias            Parameter [out_channels] or None
    activation      None or "relu", applied to the output
    pool            p x p max pool of stride p after the activation; 1: none
    layout          of the output: "contiguous", "channels_last", "batch_last", or None: like x
    parts           names of the modules that this one stands for, where several were joined

    Raises ValueError (shapes, sizes, names) and TypeError (types, dtypes).
    """

    formats = MappingProxyType({"kernelwise": Kernelwise, "unstructured": UnstructuredKernels})
    ops = MappingProxyType(
        {"kernelwise": "kernelwise_conv2d", "unstructured": "unstructured_conv2d"}
    )
    padding_mode = "zeros"

    def __init__(
        self,
        weight: Kernelwise | UnstructuredKernels,
        bias: Tensor | None = None,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        activation: str | None = None,
        pool: int = 1,
        layout: str | None = None,
        parts: tuple[str, ...] = (),
    ) -> None:
        check_activation(activation)
        super().__init__(weight, bias, activation, parts)
        if groups < 1 or weight.shape[0] % groups:
            raise ValueError(f"SparseConv2d: {weight.shape[0]} filters do not form groups={groups}")
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * groups
        self.kernel_size = weight.shape[2:]
        self.stride = make_pair("stride", stride, 1)
        self.padding = make_pair("padding", padding, 0)
        self.dilation = make_pair("dilation", dilation, 1)
        self.groups = groups
        self.pool = check_pool(pool)
        layout_code("SparseConv2d", layout)
        self.layout = layout

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        format: str = "auto",
        *,
        activation: str | None = None,
        pool: int = 1,
        mask: Tensor | None = None,
    ) -> SparseConv2d:
        """Return a module with the numbers of conv; kernels that are all zero are not stored.

        format  "kernelwise" (kernels with any non-zero are stored whole), "unstructured" (single
                weights), or "auto": "unstructured" where kernels that are kept hold many zeros
        mask    bool like weight: what is stored, zeros included; for "kernelwise" also
                [out_channels, in_channels / groups]; default: what is not zero

        Masks of torch.nn.utils.prune and mask buffers are applied first. The new module is in the
        mode (training or not) of conv and its tensors are copies.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"SparseConv2d: expected an nn.Conv2d, got {type(conv).__name__}")
        if conv.padding_mode != "zeros":
            raise ValueError(
                f"SparseConv2d: padding_mode must be 'zeros', got {conv.padding_mode!r}"
            )
        weight = read_dense(conv, "weight")
        if format == "auto":
            format = _fitting(weight, mask)
        kind = find_format("SparseConv2d", format, cls.formats)
        module = cls(
            kind.from_dense(weight, mask),
            read_dense(conv, "bias"),
            stride=conv.stride,
            padding=_padding_of(conv),
            dilation=conv.dilation,
            groups=conv.groups,
            activation=activation,
            pool=pool,
        )
        return module.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return pool(act(conv2d(x, W) + b)) for x [B, C, H, W] or [C, H, W]."""
        # Looked up in their dicts: nn.Module's attribute lookup costs a microsecond each.
        values = self._parameters["values"]
        plain = type(x) is Tensor and x.dtype is _float32 is values.dtype and not _grad_enabled()
        if torch.compiler.is_compiling() or not plain:
            return self._checked(x)
        if x.shape == self.__dict__.get("_checked_shape"):
            layout = find_layout(x)
            if layout is not None:
                return self._unchecked(x, values, layout)
        y = self._checked(x)
        self.__dict__["_checked_shape"] = x.shape if x.dim() == 4 else None
        return y

    def _index(self) -> tuple:
        buffers = self._buffers
        if self.format == "unstructured":
            index = (buffers["columns"], buffers["segments"], buffers["offsets"])
            return (*index, self.weight_shape, self._fixed["tile"])
        return (buffers["filter_offsets"], buffers["channels"])

    def _settings(self) -> tuple:
        sizes = (self.stride, self.padding, self.dilation, self.groups)
        return (*sizes, check_activation(self.activation), self.pool)

    def _unchecked(self, x: Tensor, values: Tensor, layout: int) -> Tensor:
        """Run the op on an x of the shape that passed the checks before: they cost as much."""
        code = layout if self.layout is None else layout_code("SparseConv2d", self.layout)
        rest = (self._parameters["bias"], *self._settings(), code)
        return _ops[self.format](x, values, *self._index(), *rest)

    def _checked(self, x: Tensor) -> Tensor:
        values, bias = self._parameters["values"], self._parameters["bias"]
        index, rest = self._index(), self._settings()
        if self.format == "unstructured":
            return apply_unstructured_conv(x, values, *index, bias, *rest, self.layout)
        code = layout_code("SparseConv2d", self.layout)
        return apply_kernelwise(x, values, *index, self.in_channels, bias, *rest, code)

    def extra_repr(self) -> str:
        """Sizes, sparsity, format and backend."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={tuple(self.kernel_size)}"
        text += f", stride={self.stride}, padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.pool != 1:
            text += f", pool={self.pool}"
        if self.layout is not None:
            text += f", layout={self.layout}"
        return f"{text}, bias={self.bias is not None}, {self._describe()}"


def _fitting(weight: Tensor, mask: Tensor | None) -> str:
    """Return the format in which little is stored that is zero."""
    kept = weight != 0 if mask is None else mask
    if kept.dim() == 2:
        return "kernelwise"
    whole = int(kept.flatten(2).any(2).sum()) * kept[0, 0].numel() if kept.numel() else 0
    return "kernelwise" if int(kept.sum()) >= _KERNELS_FIT * whole else "unstructured"


def _padding_of(conv: nn.Conv2d) -> Pair:
    """Return the padding of conv in numbers; raise ValueError where the sides would differ."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding != "same":
        return tuple(conv.padding)
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise ValueError(
            f"SparseConv2d: padding='same' with kernel_size={conv.kernel_size}, "
            f"dilation={conv.dilation} pads one side more than the other, which is not supported"
        )
    return total[0] // 2, total[1] // 2
