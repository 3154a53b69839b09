"""PackedConv2d: nn.Conv2d with its weight in the layout that oneDNN computes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liveweight.nn.packed_module import PackedModule

LAYOUTS = (None, "contiguous", "channels_last")
_ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "transposed",
    "output_padding",
    "_reversed_padding_repeated_twice",
)
_NO_SCALARS: list = []


class PackedConv2d(PackedModule, nn.Conv2d):
    """Dense nn.Conv2d for inference on a CPU, y = act(conv2d(x, W) + b), W packed for oneDNN.

    x           [B, in_channels, H, W] or [in_channels, H, W] float32; other dtypes, devices and
                calls that record gradients run as nn.Conv2d does
    returns     [B, out_channels, H', W'] or [out_channels, H', W'] like x
    weight      [out_channels, in_channels / groups, kh, kw], bias [out_channels] or None
    activation  None or "relu", applied to the output
    layout      memory format of the output: "contiguous", "channels_last" (oneDNN's own, no copy)
                or None: like x
    packs       False: computes as nn.Conv2d does, with the activation joined
    parts       names of the modules that this one stands for, where several were joined

    Raises what nn.Conv2d raises; from_dense raises TypeError and ValueError.
    """

    layout: str | None

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        *,
        activation: str | None = None,
        layout: str | None = None,
        packs: bool = True,
        parts: tuple[str, ...] = (),
    ) -> PackedConv2d:
        """Return a module with the parameters and the mode of conv; they are shared.

        Raises TypeError for another module and ValueError for an unknown activation or layout and
        for padding that oneDNN does not do: another mode than zeros, or more on one side.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"PackedConv2d: expected an nn.Conv2d, got {type(conv).__name__}")
        if activation not in (None, "relu"):
            raise ValueError(f"PackedConv2d: activation must be None or 'relu', got {activation!r}")
        if layout not in LAYOUTS:
            raise ValueError(f"PackedConv2d: layout must be one of {LAYOUTS}, got {layout!r}")
        if conv.padding_mode != "zeros":
            raise ValueError(
                f"PackedConv2d: padding_mode must be 'zeros', got {conv.padding_mode!r}"
            )
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        for name in _ATTRIBUTES:
            setattr(module, name, getattr(conv, name))
        module.layout = layout
        module._pads = _padding_of(conv)
        module._adopt(conv, activation, packs, parts)
        return module

    def _settings(self) -> tuple:
        return self._pads, list(self.stride), list(self.dilation), self.groups

    def _reorder(self, weight: Tensor, x: Tensor) -> Tensor:
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        return reorder(weight.contiguous(), *self._settings(), list(x.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return act(conv2d(x, W) + b) for x [B, C, H, W] or [C, H, W]."""
        if self._wants_packed(x) and x.dim() == 4 and x.size(1) == self.in_channels:
            packed = self._packed(x)
            if packed is not None:
                return self._run(x, packed)
        y = self._conv_forward(x, self._weight(), self.bias)
        y = self._joined_relu(y) if self.activation else y
        if self.layout is None or y.dim() != 4:
            return y
        last = self.layout == "channels_last"
        return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _run(self, x: Tensor, packed: Tensor) -> Tensor:
        name, bias = "relu" if self.activation else "none", self._parameters["bias"]
        # oneDNN answers in channels_last whatever the layout of x is.
        y = _convolution(x, packed, bias, *self._settings(), name, _NO_SCALARS, "")
        layout = self.layout
        if layout == "contiguous" or (layout is None and x.is_contiguous()):
            return y.contiguous()
        return y

    def extra_repr(self) -> str:
        """Sizes and what is packed and joined."""
        text = f"{super().extra_repr()}, {self._describe()}"
        return text if self.layout is None else f"{text}, layout={self.layout}"


def _padding_of(conv: nn.Conv2d) -> list[int]:
    if conv.padding == "valid":
        return [0, 0]
    if conv.padding != "same":
        return list(conv.padding)
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise ValueError(
            f"PackedConv2d: padding='same' with kernel_size={conv.kernel_size}, "
            f"dilation={conv.dilation} pads one side more than the other, which is not supported"
        )
    return [t // 2 for t in total]


_convolution = (
    torch.ops.mkldnn._convolution_pointwise.default if hasattr(torch.ops, "mkldnn") else None
)
