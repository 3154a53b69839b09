"""SparseConv2d: nn.Conv2d without the 2-D kernels that are zero."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor, nn

from liveweight.formats import Kernelwise
from liveweight.nn.sparse_module import SparseModule, find_format, read_dense
from liveweight.ops.kernelwise_conv2d import apply_kernelwise, check_pool, make_pair
from liveweight.ops.unstructured_linear import check_activation

Pair = tuple[int, int]
_DEFAULT = "kernelwise"


class SparseConv2d(SparseModule):
    """Weight-sparse (not activation-sparse) drop-in for nn.Conv2d: y = pool(act(conv2d(x, W) + b)).

    x        [B, in_channels, H, W] or [in_channels, H, W] float32 (other dtypes: plain PyTorch)
    returns  [B, out_channels, H', W'] or [out_channels, H', W'] like x

    values          Parameter [kept, kh, kw]: the kept kernels, filter after filter
    filter_offsets  buffer [out_channels + 1] int32
    channels        buffer [kept] int32, input channel inside the group
    bias            Parameter [out_channels] or None
    activation      None or "relu", applied to the output
    pool            p x p max pool of stride p after the activation; 1: none
    parts           names of the modules that this one stands for, where several were joined

    Raises ValueError (shapes, sizes, names) and TypeError (types, dtypes).
    """

    formats = MappingProxyType({"kernelwise": Kernelwise})
    ops = MappingProxyType({"kernelwise": "kernelwise_conv2d"})
    padding_mode = "zeros"

    def __init__(
        self,
        weight: Kernelwise,
        bias: Tensor | None = None,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        activation: str | None = None,
        pool: int = 1,
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

        format  "auto" or "kernelwise"
        mask    bool [out_channels, in_channels / groups] or like weight: what is stored, zeros
                included; default: kernels with any non-zero

        Masks of torch.nn.utils.prune and mask buffers are applied first. The new module is in the
        mode (training or not) of conv and its tensors are copies.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"SparseConv2d: expected an nn.Conv2d, got {type(conv).__name__}")
        kind = find_format("SparseConv2d", _DEFAULT if format == "auto" else format, cls.formats)
        if conv.padding_mode != "zeros":
            raise ValueError(
                f"SparseConv2d: padding_mode must be 'zeros', got {conv.padding_mode!r}"
            )
        module = cls(
            kind.from_dense(read_dense(conv, "weight"), mask),
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
        parameters, buffers = self._parameters, self._buffers
        return apply_kernelwise(
            x,
            parameters["values"],
            buffers["filter_offsets"],
            buffers["channels"],
            self.in_channels,
            parameters["bias"],
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            check_activation(self.activation),
            self.pool,
        )

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
        return f"{text}, bias={self.bias is not None}, {self._describe()}"


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
