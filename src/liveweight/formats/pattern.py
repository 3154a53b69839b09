"""The index part that both formats share: which columns of a row are kept, row after row."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor


class PackedWeight:
    """Sizes of a format: a dataclass with a shape, values, and per-entry indices as last tensor."""

    name: ClassVar[str]  # of the format, as users write it
    shape: tuple[int, ...]
    values: Tensor

    def validate(self) -> PackedWeight:
        """Return self if all invariants of the class hold; raise TypeError or ValueError if not."""
        raise NotImplementedError

    def to_dense(self) -> Tensor:
        """Return the weight, a new tensor."""
        raise NotImplementedError

    def mask(self) -> Tensor:
        """Return which entries are stored: bool, the weight's shape; stored zeros count."""
        return dataclasses.replace(self, values=torch.ones_like(self.values)).to_dense() != 0

    def _tensors(self) -> tuple[Tensor, ...]:
        """Return values, offsets and indices."""
        raise NotImplementedError

    @property
    def density(self) -> float:
        """Fraction of entries (Kernelwise: 2-D kernels) kept, in [0, 1]; 0 where there are none."""
        total = self.shape[0] * self.shape[1]
        return self._tensors()[-1].numel() / total if total else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices together."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self._tensors()[0].device


def expand_rows(row_offsets: Tensor, kept: int) -> Tensor:
    """Return the row of each kept entry: int64 [kept]."""
    rows = torch.arange(row_offsets.numel() - 1, device=row_offsets.device)
    counts = (row_offsets[1:] - row_offsets[:-1]).long()
    return torch.repeat_interleave(rows, counts, output_size=kept)


def check_pattern(
    owner: str, names: tuple[str, str], offsets: Tensor, columns: Tensor, size: tuple[int, int]
) -> None:
    """Raise unless offsets and columns are a pattern of size [R, n], columns ascending in a row."""
    first, second = names
    rows, width = size
    for name, index in ((first, offsets), (second, columns)):
        if index.dtype != torch.int32:
            raise TypeError(f"{owner}: {name} must be int32, got {_dtype(index)}")
        if index.dim() != 1:
            raise ValueError(f"{owner}: {name} must have 1 dimension, got {tuple(index.shape)}")
    if offsets.device != columns.device:
        raise ValueError(f"{owner}: {first} on {offsets.device}, {second} on {columns.device}")
    if offsets.numel() != rows + 1:
        raise ValueError(f"{owner}: expected {rows + 1} {first}, got {offsets.numel()}")
    if offsets[0] != 0:
        raise ValueError(f"{owner}: {first} must start at 0, got {int(offsets[0])}")
    if offsets[-1] != columns.numel():
        raise ValueError(
            f"{owner}: {first} must end at {columns.numel()}, the number of {second}, "
            f"got {int(offsets[-1])}"
        )
    if (drops := (offsets[1:] < offsets[:-1]).nonzero()).numel():
        raise ValueError(f"{owner}: {first} must not decrease, but does at {int(drops[0]) + 1}")
    outside = (columns < 0) | (columns >= width)
    if outside.any():
        got = int(columns[outside][0])
        raise ValueError(f"{owner}: {second} must be in [0, {width}), got {got}")
    row_of = expand_rows(offsets, columns.numel())
    if ((row_of[1:] == row_of[:-1]) & (columns[1:] <= columns[:-1])).any():
        raise ValueError(f"{owner}: {second} must increase strictly inside a row")


def check_values(owner: str, values: Tensor, shape: tuple[int, ...], indices: Tensor) -> None:
    """Raise unless values is a floating tensor of this shape beside its indices."""
    if not values.is_floating_point():
        raise TypeError(f"{owner}: values must be floating point, got {_dtype(values)}")
    if tuple(values.shape) != shape:
        raise ValueError(f"{owner}: values must have shape {shape}, got {tuple(values.shape)}")
    if values.device != indices.device:
        raise ValueError(f"{owner}: values on {values.device}, indices on {indices.device}")


def check_dense(owner: str, weight: Tensor, dim: int) -> None:
    """Raise unless weight is a floating tensor of this rank."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{owner}: weight must be a tensor, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"{owner}: weight must be floating point, got {_dtype(weight)}")
    if weight.dim() != dim:
        raise ValueError(
            f"{owner}: weight must have {dim} dimensions, got shape {tuple(weight.shape)}"
        )


def check_mask(owner: str, mask: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Raise unless mask is a bool tensor of one of these shapes."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = _dtype(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{owner}: mask must be a bool tensor, got {got}")
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{owner}: mask must have shape {wanted}, got {tuple(mask.shape)}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
