"""Sizes of a block convolution, and the guard in front of its Triton kernels."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from .block_linear import SIDES
from .launch import DTYPES, check_dtype, check_operand

__all__ = [
    "DTYPES",
    "SIDES",
    "TAPS",
    "Conv",
    "copy_width",
    "guard",
    "pixels_of",
    "serves",
]

TAPS = 32  # along one side of a kernel: they are the bits of a word
_LIMIT = 2**31  # of entries that are counted in int32
Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution of x_shape [B, C, H, W] with a weight of shape (Cout, C / groups, kh, kw)."""

    x_shape: tuple[int, int, int, int]
    shape: tuple[int, int, int, int]
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(cls, x_shape, shape, stride, padding, dilation, groups: int) -> Conv:
        """Return the convolution of these sizes, whatever sequences they come in."""
        return cls(*map(tuple, (x_shape, shape, stride, padding, dilation)), groups)

    @property
    def size(self) -> Pair:
        """Height and width of the output."""
        room = [self.x_shape[2 + d] + 2 * self.padding[d] for d in (0, 1)]
        reach = [self.dilation[d] * (self.shape[2 + d] - 1) + 1 for d in (0, 1)]
        height, width = ((room[d] - reach[d]) // self.stride[d] + 1 for d in (0, 1))
        return height, width

    @property
    def taps(self) -> int:
        """Entries of one 2-D kernel."""
        return self.shape[2] * self.shape[3]

    def is_product(self) -> bool:
        """True where every output sees one pixel of its own: a linear layer over pixels."""
        plain = self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
        return plain and self.taps == 1

    def grid(self, block: Pair) -> Pair:
        """Rows of blocks (over all groups) and columns of blocks (of one group)."""
        return -(-self.shape[0] // block[0]), -(-self.shape[1] // block[1])

    def density(self, kept: int, block: Pair) -> float:
        """Share of blocks that is kept."""
        rows, width = self.grid(block)
        return kept / max(rows * width, 1)

    def check_bias(self, op: str, bias: Tensor | None, values: Tensor) -> None:
        """Raise unless bias is None or [Cout] beside values."""
        if bias is not None:
            check_operand(op, "bias", bias, (self.shape[0],), values, values.dtype)

    def check_sizes(self, op: str, bo: int) -> None:
        """Raise ValueError where the sizes do not form a convolution that the kernels can count."""
        (filters, channels, kh, kw), (batch, C, H, W) = self.shape, self.x_shape
        if self.groups < 1 or channels * self.groups != C or filters % self.groups:
            raise ValueError(f"{op}: {self.x_shape}, {self.shape} do not form {self.groups} groups")
        if self.groups > 1 and filters // self.groups % bo:
            raise ValueError(f"{op}: blocks of {bo} filters cross groups={self.groups}: {self}")
        if min(*self.stride, *self.dilation, kh, kw) < 1 or min(self.padding) < 0:
            raise ValueError(f"{op}: expected a stride, dilation and kernel from 1 on, got {self}")
        height, width = self.size
        if min(height, width) < 1:
            raise ValueError(f"{op}: the convolution gives {self.size} outputs, got {self}")
        places = (H + 2 * self.padding[0]) * (W + 2 * self.padding[1])
        largest = max(
            batch * places, places * (C + 8 * self.groups), batch * (height + kh) * (width + kw),
            height * width * (filters + 8), (filters + 128) * (channels + 128) * kh * kw,
        )  # fmt: skip
        if largest >= _LIMIT:
            raise ValueError(
                f"{op}: a sample, the weight, and all samples' pixels must stay below {_LIMIT} "
                f"entries each, got {self}"
            )


def serves(block: Pair, shape: tuple[int, ...]) -> bool:
    """Return whether the kernels are made for blocks (bo, bc) of weights of this shape."""
    return block[0] in SIDES and block[1] in SIDES and max(shape[2:]) <= TAPS


def copy_width(dtype: torch.dtype) -> int:
    """Return how many entries a 16-byte copy takes."""
    return 16 // dtype.itemsize


def pixels_of(x: Tensor, groups: int = 1) -> Tensor:
    """Return x [B, C, H, W] as contiguous pixels [B, H, W, C'] that 16-byte copies can read.

    The channels of a group are padded with zeros to a multiple of 16 bytes. Without a need for that
    it is x itself where x is channels last and begins at a multiple of 16 bytes, else a copy.
    """
    batch, channels, height, width = x.shape
    pixels, short = x.permute(0, 2, 3, 1), -(channels // groups) % copy_width(x.dtype)
    if short:
        pixels = pixels.reshape(batch, height, width, groups, channels // groups)
        pixels = functional.pad(pixels, (0, short)).flatten(3)
    pixels = pixels.contiguous()
    return pixels.clone() if pixels.data_ptr() % 16 else pixels


def guard(
    op: str, conv: Conv, x: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor,
    schedule: Tensor,
) -> None:  # fmt: skip
    """Raise unless every address that the kernels form lies inside its tensor."""
    check_dtype(op, "values", values)
    if values.dim() != 4 or not serves(values.shape[:1:-1], conv.shape):
        raise ValueError(f"{op}: expected sides in {SIDES}, got values {tuple(values.shape)}")
    kept, _, bc, bo = values.shape
    if len(conv.x_shape) != 4 or len(conv.shape) != 4:
        raise ValueError(f"{op}: expected 4 dimensions of x and weight, got {conv}")
    conv.check_sizes(op, bo)
    rows, width = conv.grid((bo, bc))
    check_operand(op, "values", values, (kept, conv.taps, bc, bo), values, values.dtype)
    if x.dtype != values.dtype or x.device != values.device:
        raise TypeError(
            f"{op}: expected {values.dtype} on {values.device} like values, "
            f"got {x.dtype} on {x.device}"
        )
    for name, index, size in (
        ("row_offsets", row_offsets, rows + 1),
        ("columns", columns, kept),
        ("schedule", schedule, rows + width + (width + 1) + 2 * kept),
    ):
        check_operand(op, name, index, (size,), values, torch.int32)
