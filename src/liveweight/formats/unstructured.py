"""Single weights of a Linear layer removed anywhere: compressed sparse rows with int32 indices."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from liveweight._packing import csr_pattern
from liveweight.formats import pattern


@dataclasses.dataclass(frozen=True, eq=False)
class Unstructured(pattern.PackedWeight):
    """A sparse matrix W of shape (N, K), row after row.

    W[n, columns[i]] = values[i] for row_offsets[n] <= i < row_offsets[n + 1], zero elsewhere.

    values       [nnz] floating point
    row_offsets  [N + 1] int32, starts at 0, never decreases, ends at nnz
    columns      [nnz] int32 in [0, K), strictly increasing inside a row
    shape        (N, K) = (out_features, in_features)

    The constructor stores what it is given; ``validate`` checks it.
    """

    name: ClassVar[str] = "unstructured"

    values: Tensor
    row_offsets: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> Unstructured:
        """Keep the entries of weight [N, K] that are not zero (-0.0 is zero), or those under mask.

        mask [N, K] bool says what is kept, zeros included; values never change.
        Raises TypeError (dtypes) and ValueError (shapes).
        """
        pattern.check_dense("Unstructured", weight, 2)
        if mask is None:
            mask = weight != 0
        pattern.check_mask("Unstructured", mask, (tuple(weight.shape),))
        row_offsets, columns = csr_pattern(mask)
        return cls(weight.detach()[mask], row_offsets, columns, tuple(weight.shape))

    def to_dense(self) -> Tensor:
        """Return W [N, K], a new tensor."""
        dense = self.values.new_zeros(self.shape)
        rows = pattern.expand_rows(self.row_offsets, self.columns.numel())
        return dense.index_put((rows, self.columns.long()), self.values)

    def validate(self) -> Unstructured:
        """Return self if every invariant of the class holds; raise TypeError or ValueError if not.

        Ops do not repeat these checks: columns out of range there would read foreign memory.
        """
        names = ("row_offsets", "columns")
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise ValueError(f"Unstructured: shape must be (N, K), got {tuple(self.shape)}")
        pattern.check_pattern("Unstructured", names, self.row_offsets, self.columns, self.shape)
        pattern.check_values("Unstructured", self.values, (self.columns.numel(),), self.columns)
        return self

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.row_offsets, self.columns
