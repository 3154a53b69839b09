"""The second derivative of a layer's own error: the Gram matrix of what its units read."""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight.prune.importances import Target
from liveweight.prune.kernel_response import patches

_CHUNK = 64  # samples whose patches are held at a time


class InputGram:
    """Sums x x^T over samples and output positions: H = (2 / n) X X^T of || W X - W' X ||^2 / n.

    mean     float64 [groups, k, k], k = in_features or in_channels / groups * r * s; H / 2
    samples  rows of a Linear's input, samples of a convolution's
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._sum: Tensor | None = None
        self.samples = 0

    def update(self, x: Tensor) -> None:
        x = x.detach().to(torch.float64)
        if self._target.kind == "linear":
            rows = x.reshape(-1, x.shape[-1])
            self._add((rows.t() @ rows).unsqueeze(0))
            self.samples += rows.shape[0]
            return
        x = x if x.dim() == 4 else x.unsqueeze(0)
        groups = self._target.module.groups
        for part in x.split(_CHUNK):
            columns = patches(self._target.module, part)  # [N, C, r*s, P]
            columns = columns.unflatten(1, (groups, -1)).flatten(2, 3)  # [N, g, k, P]
            columns = columns.movedim(0, 2).flatten(2)  # [g, k, N*P]
            self._add(columns @ columns.transpose(1, 2))
        self.samples += x.shape[0]

    def _add(self, gram: Tensor) -> None:
        self._sum = gram if self._sum is None else self._sum + gram

    def check(self, name: str) -> None:
        if not torch.isfinite(self._sum).all():
            raise ValueError(
                f"layer '{name}' saw NaN or infinite activations; scores need finite ones"
            )

    @property
    def mean(self) -> Tensor:
        return self._sum / max(self.samples, 1)

    def damped(self, share: float) -> Tensor:
        """Return the mean with `share` of its mean diagonal added to it; 1 where nothing came."""
        gram = self.mean.clone()
        diagonal = gram.diagonal(dim1=1, dim2=2)
        level = share * diagonal.mean(1, keepdim=True)
        diagonal.copy_(torch.where(diagonal > 0, diagonal + level, 1.0))
        return gram


def as_rows(weight: Tensor, groups: int) -> Tensor:
    """Return a weight [out, ...] as float64 rows by group: [groups, out / groups, k]."""
    return weight.detach().double().flatten(1).unflatten(0, (groups, -1))


def as_weight(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows by group in the shape and dtype of a weight."""
    return rows.flatten(0, 1).view_as(like).to(like.dtype)
