"""Whole 2-D kernels of a Conv2d layer removed: the kept kernels, filter after filter."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from liveweight._packing import csr_pattern
from liveweight.formats import pattern


@dataclasses.dataclass(frozen=True, eq=False)
class Kernelwise(pattern.PackedWeight):
    """A convolution weight W of shape (Cout, Cin / groups, kh, kw) as a list of kept kernels.

    W[o, channels[i]] = values[i] for filter_offsets[o] <= i < filter_offsets[o + 1], else zero.

    values          [kept, kh, kw] floating point
    filter_offsets  [Cout + 1] int32, starts at 0, never decreases, ends at kept
    channels        [kept] int32 in [0, Cin / groups), strictly increasing inside a filter
    shape           (Cout, Cin / groups, kh, kw)

    The constructor stores what it is given; ``validate`` checks it.
    """

    name: ClassVar[str] = "kernelwise"

    values: Tensor
    filter_offsets: Tensor
    channels: Tensor
    shape: tuple[int, int, int, int]

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> Kernelwise:
        """Keep the kernels of weight [Cout, Cin/groups, kh, kw] that hold any non-zero.

        mask bool says what is kept: whole kernels [Cout, Cin/groups], or single entries (shape of
        weight): a kernel with any kept entry is stored and its other entries become zero.
        -0.0 is zero; values never change. Raises TypeError (dtypes) and ValueError (shapes).
        """
        pattern.check_dense("Kernelwise", weight, 4)
        weight = weight.detach()
        shape = tuple(weight.shape)
        if mask is None:
            mask = (weight != 0).flatten(2).any(2)
        pattern.check_mask("Kernelwise", mask, (shape[:2], shape))
        if mask.dim() == 4:
            weight = torch.where(mask, weight, 0)
            mask = mask.flatten(2).any(2)
        filter_offsets, channels = csr_pattern(mask)
        return cls(weight[mask], filter_offsets, channels, shape)

    def to_dense(self) -> Tensor:
        """Return W [Cout, Cin/groups, kh, kw], a new tensor."""
        dense = self.values.new_zeros(self.shape)
        filters = pattern.expand_rows(self.filter_offsets, self.channels.numel())
        return dense.index_put((filters, self.channels.long()), self.values)

    def validate(self) -> Kernelwise:
        """Return self if every invariant of the class holds; raise TypeError or ValueError if not.

        Ops do not repeat these checks: channels out of range there would read foreign memory.
        """
        names = ("filter_offsets", "channels")
        if len(self.shape) != 4 or min(self.shape) < 0:
            raise ValueError(
                f"Kernelwise: shape must be (Cout, Cin/groups, kh, kw), got {tuple(self.shape)}"
            )
        size = self.shape[:2]
        pattern.check_pattern("Kernelwise", names, self.filter_offsets, self.channels, size)
        wanted = (self.channels.numel(), *self.shape[2:])
        pattern.check_values("Kernelwise", self.values, wanted, self.channels)
        return self

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.filter_offsets, self.channels
