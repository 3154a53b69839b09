"""SparseConv2d: nn.Conv2d without the 2-D kernels, single weights or blocks that are zero."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn

from liveweight._check import make_pair
from liveweight.formats import BlockKernels, Kernelwise, UnstructuredKernels
from liveweight.formats.block_kernels import GPU_COSTS
from liveweight.nn.sparse_module import SparseModule, find_format, read_dense
from liveweight.ops.block_conv2d import apply_block_conv, check_groups
from liveweight.ops.kernelwise_conv2d import apply_kernelwise, check_pool
from liveweight.ops.layout import layout_code
from liveweight.ops.unstructured_conv2d import apply_unstructured_conv
from liveweight.ops.unstructured_linear import check_activation
from liveweight.reference.layouts import CHANNELS_LAST, find_layout, lay_out

Pair = tuple[int, int]
# Kernels of which so many entries are not zero are stored whole.
_KERNELS_FIT = 0.7
# A weight on a GPU is stored as blocks if so much of what they keep is not zero.
_BLOCKS_FIT = 0.9
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
    layout          of the output: "contiguous", "channels_last", "batch_last", or None: like x.
                    Blocks are computed in channels_last, which None leaves: x in another layout
                    costs a copy, another layout a second one, and a pool a pass of its own
    parts           names of the modules that this one stands for, where several were joined

    Raises ValueError (shapes, sizes, names) and TypeError (types, dtypes).
    """

    formats = MappingProxyType(
        {"kernelwise": Kernelwise, "unstructured": UnstructuredKernels, "block": BlockKernels}
    )
    ops = MappingProxyType(
        {
            "kernelwise": "kernelwise_conv2d",
            "unstructured": "unstructured_conv2d",
            "block": "block_conv2d",
        }
    )
    padding_mode = "zeros"

    def __init__(
        self,
        weight: Kernelwise | UnstructuredKernels | BlockKernels,
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
        if isinstance(weight, BlockKernels):
            check_groups(weight.shape, weight.block[0], groups)
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * groups
        self.kernel_size = weight.shape[2:]
        self.stride = make_pair("SparseConv2d", "stride", stride, 1)
        self.padding = make_pair("SparseConv2d", "padding", padding, 0)
        self.dilation = make_pair("SparseConv2d", "dilation", dilation, 1)
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
        block: tuple[int, int] | None = None,
    ) -> SparseConv2d:
        """Return a module with the numbers of conv; kernels that are all zero are not stored.

        format  "kernelwise" (kernels with any non-zero are stored whole), "unstructured" (single
                weights), "block" (filters x channels, for GPUs), or "auto": "unstructured" where
                kernels that are kept hold many zeros, "block" where `block` is given or, on a GPU,
                zeros form blocks
        mask    bool like weight: what is stored, zeros included; for "kernelwise" also
                [out_channels, in_channels / groups]; default: what is not zero
        block   (filters, channels) of a block for "block"; default: BlockKernels.best_block

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
            fits = block is not None or _forms_blocks(weight, mask, conv.groups)
            format = "block" if fits else _fitting(weight, mask)
        kind = find_format("SparseConv2d", format, cls.formats)
        options = {}
        if kind is BlockKernels:
            kept = _kept(weight, mask).to(weight.dtype)
            options["block"] = block or BlockKernels.best_block(kept, groups=conv.groups)[0]
        module = cls(
            kind.from_dense(weight, mask, **options),
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
        short = x.dim() == 4 and self.format != "block"
        self.__dict__["_checked_shape"] = x.shape if short else None
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
        if self.format == "block":
            return self._through_blocks(x, values, bias)
        index, rest = self._index(), self._settings()
        if self.format == "unstructured":
            return apply_unstructured_conv(x, values, *index, bias, *rest, self.layout)
        code = layout_code("SparseConv2d", self.layout)
        return apply_kernelwise(x, values, *index, self.in_channels, bias, *rest, code)

    def _through_blocks(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve in channels_last; what the op has no part in, pool and layout, comes after."""
        index = tuple(self._buffers[name] for name in ("row_offsets", "columns", "schedule"))
        *sizes, pool = self._settings()
        y = apply_block_conv(x, values, *index, self.weight_shape, bias, *sizes)
        if pool > 1:
            if min(y.shape[-2:]) < pool:
                got = tuple(y.shape[-2:])
                raise ValueError(f"SparseConv2d: outputs of {got} are too small for pool={pool}")
            y = nn.functional.max_pool2d(y, pool)
        code = layout_code("SparseConv2d", self.layout)
        if code in (None, CHANNELS_LAST):
            return y
        return lay_out(y, code) if y.dim() == 4 else lay_out(y[None], code)[0]

    def _backend(self) -> str:
        served = self.format != "block" or self.pack().block in GPU_COSTS
        return super()._backend() if served or not self.values.is_cuda else "reference"

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
    if mask is not None and mask.dim() == 2:
        return "kernelwise"
    kept = _kept(weight, mask)
    whole = int(kept.flatten(2).any(2).sum()) * kept[0, 0].numel() if kept.numel() else 0
    return "kernelwise" if int(kept.sum()) >= _KERNELS_FIT * whole else "unstructured"


def _kept(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Return which entries of weight are stored: bool like weight."""
    if mask is None:
        return weight != 0
    return mask if mask.dim() == 4 else mask[:, :, None, None].expand(weight.shape)


def _forms_blocks(weight: Tensor, mask: Tensor | None, groups: int) -> bool:
    """Return whether a weight on a GPU lacks entries and what it keeps fills blocks."""
    if not weight.is_cuda:
        return False
    kept = _kept(weight, mask)
    sizes = [s for s in GPU_COSTS if groups == 1 or weight.shape[0] // groups % s[0] == 0]
    if not sizes or bool(kept.all()):
        return False
    return BlockKernels.best_block(kept.to(weight.dtype), sizes, groups=groups)[1] >= _BLOCKS_FIT


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
