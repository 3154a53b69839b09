"""At most n weights kept in each group of m neighbours along a row, as 2:4."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from liveweight.formats.unstructured import Unstructured


@dataclasses.dataclass(frozen=True, eq=False)
class NM(Unstructured):
    """A matrix W of shape (N, K) that keeps at most n of every m entries along K.

    A CPU gains nothing from the regularity that lists of entries do not already give: entries are
    stored, and computed with, as those of Unstructured.

    n, m  the pattern, 2:4 by default; a last group of fewer than m entries may keep n too

    The other fields are those of Unstructured.
    """

    name: ClassVar[str] = "nm"

    n: int
    m: int

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        mask: Tensor | None = None,
        *,
        n: int = 2,
        m: int = 4,
        tile: tuple[int, int] | None = None,
    ) -> NM:
        """Keep the entries of weight [N, K] that are not zero, or those under mask [N, K] bool.

        Raises TypeError (dtypes), ValueError (shapes, sizes) and ValueError that names the first
        group with more than n entries.
        """
        _check_sizes(n, m)
        base = Unstructured.from_dense(weight, mask, tile=tile)
        _check_groups(*base.coordinates(), base.shape, n, m)
        fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
        return cls(**fields, n=n, m=m)

    def validate(self) -> NM:
        """Return self if all invariants of the class hold; raise TypeError or ValueError if not."""
        _check_sizes(self.n, self.m)
        super().validate()
        _check_groups(*self.coordinates(), self.shape, self.n, self.m)
        return self


def _check_sizes(n: int, m: int) -> None:
    if not (isinstance(n, int) and isinstance(m, int) and 1 <= n <= m):
        raise ValueError(f"NM: expected whole numbers 1 <= n <= m, got n={n!r}, m={m!r}")


def _check_groups(rows: Tensor, columns: Tensor, shape: tuple[int, int], n: int, m: int) -> None:
    """Raise ValueError that names the first group that keeps more than n entries."""
    along = -(-shape[1] // m)
    counts = torch.bincount(rows * along + columns // m, minlength=shape[0] * along)
    full = (counts > n).nonzero()
    if full.numel():
        group = int(full[0])
        row, first = group // along, group % along * m
        raise ValueError(
            f"NM: expected at most {n} of {m} entries kept, got {int(counts[group])} in row {row}, "
            f"columns {first} to {min(first + m, shape[1]) - 1}"
        )
