"""Convolutions with missing weights and what they should give: unstructured_conv2d's tests."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from liveweight import reference
from liveweight.formats import UnstructuredKernels

LAYOUTS = ("contiguous", "channels_last", "batch_last")


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution; pairs are (height, width)."""

    channels: int = 6
    filters: int = 5
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (9, 11)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch: int = 3
    tile: tuple[int, int] | None = None

    def make(self, density: float = 0.4, dtype=torch.float32):
        """Return (x, dense weight with missing entries, its format, bias)."""
        shape = (self.filters, self.channels // self.groups, *self.kernel)
        weight = torch.randn(shape, dtype=dtype) * (torch.rand(shape) < density)
        x = torch.randn(self.batch, self.channels, *self.size, dtype=dtype)
        packed = UnstructuredKernels.from_dense(weight, tile=self.tile)
        return x, weight, packed, torch.randn(self.filters, dtype=dtype)

    @property
    def options(self) -> dict:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    @property
    def settings(self) -> tuple:
        return tuple(self.options.values())


def parts(packed: UnstructuredKernels) -> tuple:
    return packed.columns, packed.segments, packed.offsets, packed.shape, packed.tile


def expected(x, weight, bias, case, activation=None, pool=1):
    bias = None if bias is None else bias.double()
    y = F.conv2d(x.double(), weight.double(), bias, **case.options)
    y = y.relu() if activation else y
    return F.max_pool2d(y, pool) if pool > 1 else y


def assert_close(got, want, terms: int):
    # Rounding of a float32 sum of `terms` products of unit normals.
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6 * max(terms, 1) ** 0.5)


CASES = {
    "3x3": Case(),
    "3x3 wide": Case(size=(8, 33)),
    "3x3 on 16x16": Case(size=(16, 16), channels=23),
    "3x3 on 8x8": Case(size=(8, 8), channels=24, filters=70),
    "3x3 on 4x4": Case(size=(4, 4), channels=12),
    "3x3 on 1x1": Case(size=(1, 1)),
    "lenet 1": Case(1, 20, (5, 5), (28, 28), padding=(0, 0)),
    "1x1": Case(70, kernel=(1, 1), padding=(0, 0), size=(14, 14)),
    "1x1 on 16x16": Case(kernel=(1, 1), padding=(0, 0), size=(16, 16)),
    "one row": Case(kernel=(1, 3), padding=(0, 1), size=(1, 14)),
    "1x1 padded": Case(kernel=(1, 1), padding=(2, 1)),
    "1x1 stride 2": Case(kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "stride 2": Case(stride=(2, 2)),
    "stride 2, even size": Case(stride=(2, 2), size=(16, 16)),
    "strides 3, 2": Case(stride=(3, 2)),
    "stride beyond the kernel": Case(kernel=(2, 2), stride=(3, 4), padding=(0, 0)),
    "7x7 stride 2": Case(kernel=(7, 7), stride=(2, 2), padding=(3, 3), size=(23, 21)),
    "dilation": Case(dilation=(2, 2), padding=(2, 2)),
    "dilation and stride": Case(dilation=(3, 2), stride=(2, 2), padding=(2, 3)),
    "uneven kernel": Case(kernel=(1, 4), padding=(0, 2)),
    "17x17": Case(kernel=(17, 17), padding=(8, 8)),
    "padding beyond the kernel": Case(padding=(4, 5)),
    "groups": Case(groups=2, filters=4),
    "depthwise": Case(groups=6, filters=12),
    "small tiles": Case(channels=10, filters=9, tile=(4, 3)),
    "groups across tiles": Case(channels=10, filters=12, groups=2, tile=(5, 2)),
    "one channel": Case(channels=1, filters=1, batch=1),
    "sixteen samples": Case(batch=16),
    "many samples": Case(batch=17, size=(5, 6)),
}


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    return reference.lay_out(x, LAYOUTS.index(layout))
