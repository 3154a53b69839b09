"""Single weights removed anywhere, exactly: two of every four as 2:4, the others as deltas."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from liveweight.formats import pattern
from liveweight.formats.delta import Delta
from liveweight.formats.semi_structured import SemiStructured


@dataclasses.dataclass(frozen=True, eq=False)
class SemiStructuredDelta(pattern.PackedWeight):
    """A matrix W = first + rest of shape (N, K), of any pattern; no entry is in both.

    Of every four neighbours along a row, the two kept of largest magnitude (the lower column of
    equal ones) are in first, 2:4; what else is kept is in rest. Where a share d of W is kept at
    random, rest has d^3 (1 - d) + d^4 / 2 of its entries: 9 % at d = 0.5, 2 % at 0.3. A 16-bit W
    then takes 1.4 and 1.2 bytes for each entry.

    first  SemiStructured (N, K)
    rest   Delta (N, K), values like those of first
    """

    name: ClassVar[str] = "semi_structured_delta"

    first: SemiStructured
    rest: Delta

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> SemiStructuredDelta:
        """Keep the entries of weight [N, K] that are not zero, or those under mask [N, K] bool.

        Raises TypeError (dtypes) and ValueError (shapes).
        """
        pattern.check_dense("SemiStructuredDelta", weight, 2)
        if mask is None:
            mask = weight != 0
        pattern.check_mask("SemiStructuredDelta", mask, (tuple(weight.shape),))
        weight, mask = weight.detach(), mask.to(weight.device)
        first = largest_two(weight, mask)
        return cls(
            SemiStructured.from_dense(weight, first), Delta.from_dense(weight, mask & ~first)
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) = (out_features, in_features)."""
        return self.first.shape

    def to_dense(self) -> Tensor:
        """Return W [N, K], a new tensor."""
        return self.first.to_dense() + self.rest.to_dense()

    def validate(self) -> SemiStructuredDelta:
        """Return self if both parts are valid and fit; raise TypeError or ValueError if not."""
        self.first.validate()
        self.rest.validate()
        if tuple(self.first.shape) != tuple(self.rest.shape):
            raise ValueError(
                f"SemiStructuredDelta: first has shape {tuple(self.first.shape)}, rest "
                f"{tuple(self.rest.shape)}"
            )
        values = (self.first.values, self.rest.values)
        for name, (a, b) in (
            ("dtype", tuple(v.dtype for v in values)),
            ("device", tuple(v.device for v in values)),
        ):
            if a != b:
                raise ValueError(f"SemiStructuredDelta: first has {name} {a}, rest {b}")
        return self

    @property
    def density(self) -> float:
        """Fraction of entries kept, in [0, 1]; 0 where there are none."""
        return self.first.density + self.rest.density

    def _tensors(self) -> tuple[Tensor, ...]:
        return *self.first._tensors(), *self.rest._tensors()


def largest_two(weight: Tensor, mask: Tensor) -> Tensor:
    """Return where, of every four neighbours in a row, the two largest kept stand: [N, K] bool.

    Magnitudes count, NaN above all; of equal ones the lower column comes first.
    """
    N, K = weight.shape
    beside = -K % 4
    sizes = functional.pad(weight.abs().masked_fill(~mask, -1), (0, beside), value=-1)
    groups = sizes.view(N, (K + beside) // 4, 4)
    order = groups.sort(dim=2, descending=True, stable=True).indices
    chosen = torch.zeros_like(groups, dtype=torch.bool).scatter(2, order[..., :2], True)
    return chosen.flatten(1)[:, :K] & mask
