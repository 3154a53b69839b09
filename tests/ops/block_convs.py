"""Convolutions with missing blocks and what they should give: tests of the op and its kernels."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from liveweight.formats import BlockKernels

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution; pairs are (height, width), block is (filters, channels)."""

    channels: int = 32
    filters: int = 32
    kernel: Pair = (3, 3)
    size: Pair = (5, 6)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    batch: int = 2
    block: Pair = (16, 16)
    density: float = 0.5

    def make(self, dtype=torch.float32, device="cpu"):
        """Return (x channels last, dense weight with missing blocks, its format, bias)."""
        shape = (self.filters, self.channels // self.groups, *self.kernel)
        weight = torch.randn(shape) * block_mask(shape, self.block, self.density)
        packed = BlockKernels.from_dense(weight.to(device, dtype), block=self.block)
        x = torch.randn(self.batch, self.channels, *self.size, device=device).to(dtype)
        bias = torch.randn(self.filters, device=device).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        return x, weight.to(device, dtype), packed, bias

    @property
    def options(self) -> dict:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    @property
    def settings(self) -> tuple:
        return tuple(self.options.values())


def block_mask(shape, block: Pair, density: float) -> torch.Tensor:
    """Return a mask [Cout, C, 1, 1] of whole blocks, each kept with this probability."""
    rows, width = (-(-n // side) for n, side in zip(shape, block, strict=False))
    kept = torch.rand(rows, width) < density
    kept = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return kept[: shape[0], : shape[1], None, None]


def index(packed: BlockKernels) -> tuple:
    return packed.row_offsets, packed.columns, packed.schedule, packed.shape


def expected(x, weight, bias, case: Case, relu: bool = False) -> torch.Tensor:
    """The dense convolution in float64."""
    bias = None if bias is None else bias.double()
    y = functional.conv2d(x.double(), weight.double(), bias, **case.options)
    return y.relu() if relu else y


def expected_grads(grad, x, weight, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the dense convolution in float64: to x and to the weight."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = functional.conv2d(x, weight, None, **case.options)
    return torch.autograd.grad(y, (x, weight), grad.double())


CASES = {
    "3x3": Case(),
    "1x1": Case(48, 32, (1, 1), padding=(0, 0)),
    "1x1 padded": Case(kernel=(1, 1), padding=(2, 1)),
    "1x1 stride 2": Case(kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "stride 2": Case(stride=(2, 2), size=(7, 8)),
    "strides 3, 2": Case(stride=(3, 2), size=(9, 7)),
    "stride beyond the kernel": Case(kernel=(2, 2), stride=(3, 4), padding=(0, 0), size=(9, 10)),
    "dilation": Case(dilation=(2, 3), padding=(2, 3), size=(6, 7)),
    "dilation and stride": Case(dilation=(2, 3), stride=(2, 2), padding=(2, 3), size=(7, 8)),
    "dilation equals stride": Case(dilation=(2, 2), stride=(2, 2), padding=(2, 2), size=(7, 8)),
    "uneven kernel": Case(kernel=(1, 4), padding=(0, 2)),
    "padding beyond the kernel": Case(padding=(4, 5), size=(3, 4)),
    "groups": Case(64, 32, groups=2),
    "groups of ragged channels": Case(42, 32, groups=2, density=1.0),
    "ragged channels": Case(37, 45, block=(16, 16), density=0.7),
    "fewer than a block": Case(3, 5, block=(16, 16), density=1.0),
    "wide blocks": Case(64, 64, block=(32, 64), density=0.8),
    "nothing kept": Case(density=0.0),
    "one output": Case(size=(3, 3), padding=(0, 0), batch=1),
    "empty batch": Case(batch=0),
}
