"""Masks with structure: whole blocks, and V:N:M panels, from scores of weights or kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from liveweight._check import near_misses
from liveweight.prune.importances import GRANULARITIES, Target

KINDS = ("conv", "linear")


def _check_sizes(name: str, value: object, what: str, count: int) -> tuple[int, ...]:
    fits = isinstance(value, (tuple, list)) and len(value) == count
    if not fits or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
        raise TypeError(f"{name} must be {what}, got {value!r}")
    return tuple(value)


def _groups(target: Target) -> int:
    return getattr(target.module, "groups", 1)


@dataclass(frozen=True)
class Blocks:
    """Blocks of height x width: output by input features, or output by input channels.

    A block of a convolution holds whole kernels. The last blocks of a row and of a column are
    smaller where the sides do not divide the layer's sizes. Blocks do not cross the groups of a
    grouped convolution, so the height must divide its out_channels / groups.
    """

    noun: ClassVar[str] = "block"

    height: int
    width: int

    @classmethod
    def parse(cls, value: object) -> Blocks:
        """Return the blocks of block=(height, width).

        Raises TypeError where value is no pair of ints, ValueError where one is below 1.
        """
        height, width = _check_sizes("block", value, "a pair (height, width) of ints", 2)
        if height < 1 or width < 1:
            raise ValueError(f"block: height and width must be at least 1, got {value!r}")
        return cls(height, width)

    def __str__(self) -> str:
        return f"block {self.height}x{self.width}"

    def unfit(self, target: Target) -> str:
        """Return why a layer cannot have such blocks, "" where it can."""
        return _crosses_groups(target, self.height, f"blocks of {self.height} rows")

    def sums(self, scores: Tensor) -> Tensor:
        """Return the sum over every block: scores [out, in, ...] -> float64 [rows, columns]."""
        flat = scores.flatten(2).sum(2, dtype=torch.float64) if scores.dim() > 2 else scores
        below, right = -flat.shape[0] % self.height, -flat.shape[1] % self.width
        tiles = F.pad(flat, (0, right, 0, below))
        tiles = tiles.unflatten(0, (-1, self.height)).unflatten(2, (-1, self.width))
        return tiles.sum((1, 3), dtype=torch.float64)

    def spread(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the mask in which block (r, c) is kept[r, c]: bool of the given shape."""
        rows = kept.repeat_interleave(self.height, 0)[: shape[0]]
        mask = rows.repeat_interleave(self.width, 1)[:, : shape[1]]
        return mask.view(*mask.shape, *[1] * (len(shape) - 2)).expand(shape)


@dataclass(frozen=True)
class Panels:
    """V:N:M with N = 2: per panel of V rows, 4 of each M columns; per row, 2 of these 4.

    Columns are input features, or input channels: separately at every position of the kernel where
    single weights are scored, of whole kernels where kernels are. Kept: 2 / M of the weights.
    """

    noun: ClassVar[str] = "vnm"

    rows: int
    kept: int
    group: int

    @classmethod
    def parse(cls, value: object) -> Panels:
        """Return the panels of pattern=(V, N, M).

        Raises TypeError where value is no triple of ints, ValueError for V < 1, N other than 2 and
        M < 4.
        """
        rows, kept, group = _check_sizes("pattern", value, "a triple (V, N, M) of ints", 3)
        if rows < 1 or kept != 2 or group < 4:
            raise ValueError(f"pattern (V, N, M) must have V >= 1, N = 2 and M >= 4, got {value!r}")
        return cls(rows, kept, group)

    def __str__(self) -> str:
        return f"vnm {self.rows}:{self.kept}:{self.group}"

    def unfit(self, target: Target) -> str:
        """Return why a layer cannot have this pattern, "" where it can."""
        columns = target.score_shape[1]
        if columns % self.group:
            what = "input features" if target.kind == "linear" else "input channels (per group)"
            return f"M = {self.group} does not divide its {columns} {what}"
        return _crosses_groups(target, self.rows, f"panels of {self.rows} rows")

    def select(self, scores: Tensor, alive: Tensor) -> Tensor:
        """Return the mask: scores [out, in, ...] >= 0, alive bool of the same shape.

        The 4 columns of a group have the largest sums over the panel, the 2 of a row are its
        largest among them; equals by lower index. The last panel may have fewer rows.
        """
        flat, live = (
            t.flatten(2).movedim(2, 0) if t.dim() > 2 else t[None] for t in (scores, alive)
        )
        flat = flat.unflatten(2, (-1, self.group))  # [positions, out, groups, M]
        live = live.unflatten(2, (-1, self.group))
        flat = torch.where(live, flat, 0.0)
        panels = F.pad(flat, (0, 0, 0, 0, 0, -flat.shape[1] % self.rows))
        sums = panels.unflatten(1, (-1, self.rows)).sum(2, dtype=torch.float64)
        columns = _largest_along(sums, 4).repeat_interleave(self.rows, 1)[:, : flat.shape[1]]
        # What was pruned before comes after every live entry, and before the other columns.
        ranks = torch.where(live, flat, -1.0).masked_fill(~columns, -2.0)
        mask = (_largest_along(ranks, self.kept) & live).flatten(2)
        return mask.movedim(0, 2).reshape(scores.shape)


@dataclass(frozen=True)
class Neurons:
    """Whole output units: rows of a Linear, filters of a convolution."""

    noun: ClassVar[str] = "neuron"

    def __str__(self) -> str:
        return "neuron"

    def unfit(self, target: Target) -> str:
        """Return why a layer cannot lose units: never here, the caller knows the outputs."""
        return ""

    def sums(self, scores: Tensor) -> Tensor:
        """Return the sum of every unit, side by side: scores [out, ...] -> float64 [1, out]."""
        return scores.flatten(1).sum(1, dtype=torch.float64).unsqueeze(0)

    def spread(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the mask that keeps the units of kept [1, out]: bool of the given shape."""
        return kept.view(-1, *[1] * (len(shape) - 1)).expand(shape)


Structure = Blocks | Panels | Neurons


def by_target(scores: Tensor, target: Target) -> Tensor:
    """Add up scores of single weights [out, in, ...] to what a target's scores stand for."""
    return (
        scores.flatten(2).sum(2) if target.granularity == "kernel" and scores.dim() > 2 else scores
    )


def _crosses_groups(target: Target, rows: int, what: str) -> str:
    groups = _groups(target)
    per_group = target.score_shape[0] // groups
    if groups == 1 or per_group % rows == 0:
        return ""
    return f"{what} cross its {groups} groups of {per_group} output channels"


def _largest_along(values: Tensor, count: int) -> Tensor:
    """Mark the largest `count` values along the last dimension, equals by lower index."""
    order = values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, True)


def check_granularity(granularity: str | None, allowed: tuple[str, ...] = GRANULARITIES) -> None:
    """Raise ValueError with near misses for a granularity that is not allowed; None always is."""
    if granularity is not None and granularity not in allowed:
        raise ValueError(
            f"granularity must be one of {allowed}, got {granularity!r}: "
            f"{near_misses(str(granularity), allowed)}"
        )


def check_structure(
    granularity: str | None = None, block: object = None, pattern: object = None
) -> None:
    """Raise what prune_ raises for these arguments: TypeError or ValueError."""
    parse_structure(granularity, block, pattern)


def parse_structure(
    granularity: str | None, block: object, pattern: object
) -> dict[str, Structure] | None:
    """Return the structure by kind of layer, None where weights or kernels are removed one by one.

    block      (height, width), or {"conv": (h, w), "linear": (h, w)}; with granularity="block"
    pattern    (V, 2, M), or such a dict; with granularity="vnm"
    Raises ValueError for an unknown granularity, and where block or pattern is missing, unusable or
    given without its granularity; TypeError where it is no tuple of ints.
    """
    check_granularity(granularity)
    given = {"block": ("block", block, Blocks), "vnm": ("pattern", pattern, Panels)}
    for name, (argument, value, _) in given.items():
        if name != granularity and value is not None:
            raise ValueError(
                f"{argument}={value!r} goes with granularity={name!r}, got {granularity!r}"
            )
    if granularity == "neuron":
        return dict.fromkeys(KINDS, Neurons())
    if granularity not in given:
        return None
    argument, value, structure = given[granularity]
    if value is None:
        sizes = "(height, width)" if granularity == "block" else "(V, 2, M)"
        raise ValueError(f"granularity={granularity!r} needs {argument}={sizes}")
    if not isinstance(value, Mapping):
        return dict.fromkeys(KINDS, structure.parse(value))
    unknown = [kind for kind in value if kind not in KINDS]
    if unknown or not value:
        raise ValueError(f"{argument}: keys must be among {KINDS}, got {list(value)}")
    return {kind: structure.parse(sizes) for kind, sizes in value.items()}


def kept_mass(scores: Tensor, keep: Tensor) -> tuple[float, float]:
    """Return the share of the sum of the scores that a mask keeps, and the largest possible one.

    The second is the share of as many largest scores, wherever they stand: what a mask without
    structure keeps. Both are 1 where all scores are zero.
    """
    total = float(scores.sum(dtype=torch.float64))
    if total == 0:
        return 1.0, 1.0
    count = int(keep.sum())
    best = scores.flatten().topk(count, sorted=False).values if count else scores.new_zeros(0)
    kept = float(torch.where(keep, scores, 0.0).sum(dtype=torch.float64))
    return kept / total, float(best.sum(dtype=torch.float64)) / total
