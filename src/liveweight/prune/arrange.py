"""Orders of units in which what is worth keeping stands in few blocks.

A view says what it is worth to put units into one block: unit u brings values[u, k] to block k of
the other axis, and the `kept` largest sums over blocks stay. Two steps take turns, and neither can
lose: which blocks stay is exact for an order; units change places, two blocks at a time and exactly
for the two, while the kept blocks stand. Starts: the order as it is, and halving along the leading
direction of the values. Everything is deterministic. (Where the last blocks are smaller, which
stay is decided by their means, and a round may lose: it then is the last one.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from liveweight._check import check_fraction, check_tensor

_ROUNDS = 30
_ENOUGH = 1e-4  # a round that gains less than this share of the mass is the last one
_POWER_STEPS = 12


@dataclass(frozen=True)
class View:
    """One layer seen along one of its axes.

    values  float32 or float64 [units, blocks of the other axis], >= 0; what all views together keep
            is to be largest, so they are shares of the layer's sum
    size    units per block; the last block may have fewer
    widths  int64 [blocks of the other axis]: their sizes
    budget  entries (units x sizes) that may stay, at least one block

    As in `prune_`, blocks stay in the order of their mean.
    """

    values: Tensor
    size: int
    widths: Tensor
    budget: int

    def sums(self, order: Tensor) -> Tensor:
        """Return what every block holds: float64 [blocks of units, blocks of the other axis]."""
        rows = F.pad(self.values[order], (0, 0, 0, -len(order) % self.size))
        return rows.unflatten(0, (-1, self.size)).sum(1, dtype=torch.float64)

    def best(self, sums: Tensor) -> Tensor:
        """Mark the blocks that stay: bool like sums."""
        heights = torch.full((len(sums), 1), self.size, device=sums.device)
        heights[-1] = len(self.values) - (len(sums) - 1) * self.size
        areas = heights * self.widths
        order = (sums / areas).flatten().sort(descending=True, stable=True).indices
        fits = areas.flatten()[order].cumsum(0) <= self.budget
        fits[0] = True
        mask = torch.zeros_like(fits)
        mask[order] = fits
        return mask.view_as(sums)


def kept_by(views: Sequence[View], order: Tensor) -> float:
    """Return what an order lets the views keep, summed over them."""
    return sum(float(s[v.best(s)].sum()) for v in views for s in [v.sums(order)])


def arrange(views: Sequence[View], present: Tensor) -> Tensor:
    """Return an order of the units that keeps at least as much as the present one.

    present, returned  int64 [units]: order[i] is the unit at place i
    """
    views = [v for v in views if v.size > 1]
    best, most = present, kept_by(views, present)
    if not views or len(present) < 2:
        return best
    features = torch.cat([v.values.double() for v in views], 1)
    for start in (present, _halve(features, present, max(v.size for v in views))):
        order = _refine(views, start)
        if (kept := kept_by(views, order)) > most:
            best, most = order, kept
    return best


def _halve(features: Tensor, order: Tensor, size: int) -> Tensor:
    """Sort by the leading direction, cut in the middle, go on with the halves down to one block."""
    blocks = -(-len(order) // size)
    if blocks < 2:
        return order
    rows = features[order]
    rows = rows - rows.mean(0)
    order = order[(rows @ _leading(rows)).argsort(descending=True, stable=True)]
    cut = (blocks + 1) // 2 * size
    return torch.cat([_halve(features, part, size) for part in (order[:cut], order[cut:])])


def _leading(rows: Tensor) -> Tensor:
    """Return about the leading right singular vector, by power iteration from the longest row."""
    vector = rows[rows.square().sum(1).argmax()]
    for _ in range(_POWER_STEPS):
        vector = F.normalize(vector, dim=0)
        vector = rows.T @ (rows @ vector)
    return F.normalize(vector, dim=0)


def _refine(views: Sequence[View], order: Tensor) -> Tensor:
    cells = _cells(len(order), [v.size for v in views])
    most = kept_by(views, order)
    for _ in range(_ROUNDS):
        worth = torch.zeros(len(order), len(cells), device=order.device, dtype=torch.float64)
        for view in views:
            mask = view.best(view.sums(order)).to(view.values.dtype)
            blocks = torch.tensor([first // view.size for first, _ in cells], device=order.device)
            worth += (view.values @ mask.T)[:, blocks]
        found = _exchange(worth, order, cells)
        gained = kept_by(views, found) - most
        if gained > 0:
            order, most = found, most + gained
        if gained < _ENOUGH:
            break
    return order


def _cells(units: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return [first, last) of the longest runs of places that no view's block boundary cuts."""
    cuts = sorted({0, units}.union(*(range(0, units, size) for size in sizes)))
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def _exchange(worth: Tensor, order: Tensor, cells: list[tuple[int, int]]) -> Tensor:
    """Let every two cells share their units out anew; worth [units, cells] of a unit in a cell."""
    longest = max(last - first for first, last in cells)
    members = torch.full((len(cells), longest), -1, dtype=torch.int64, device=order.device)
    for row, (first, last) in zip(members, cells, strict=True):
        row[: last - first] = order[first:last]
    for left, right in _rounds(len(cells), order.device):
        units = torch.cat([members[left], members[right]], 1)  # [pairs, 2 * longest]
        gain = worth[units, left[:, None]] - worth[units, right[:, None]]
        empty = units < 0
        gain[:, :longest].masked_fill_(empty[:, :longest], torch.inf)
        gain[:, longest:].masked_fill_(empty[:, longest:], -torch.inf)
        units = units.gather(1, gain.sort(dim=1, descending=True, stable=True).indices)
        members[left], members[right] = units[:, :longest], units[:, longest:]
    return members[members >= 0]


def _rounds(count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return rounds of disjoint pairs in which every two of `count` meet once (circle method)."""
    ring = list(range(count)) + ([-1] if count % 2 else [])
    rounds = []
    for _ in range(len(ring) - 1):
        pairs = [(ring[i], ring[-1 - i]) for i in range(len(ring) // 2)]
        pairs = [sorted(p) for p in pairs if -1 not in p]
        if pairs:
            both = torch.tensor(pairs, device=device)
            rounds.append((both[:, 0], both[:, 1]))
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


def cluster_rows(scores: Tensor, height: int, *, width: int = 1, sparsity: float = 0.9) -> Tensor:
    """Return an order of the rows of a layer in which blocks of height x width keep more.

    For one layer on its own; the order is undone at its output:

        order = cluster_rows(scores, height, width=width)
        y = torch.empty_like(z); y[..., order] = z,  z = x W[order]^T + b[order]

    which is x W^T + b: every output is the same dot product as before. `prune.cluster_` folds such
    orders into a whole model instead, at no cost when it runs.

    scores    [out, in] or [out, in, r, s], finite and >= 0 (`lw.score` of a layer)
    height    rows per block; width: columns per block
    sparsity  share of the blocks to be removed later, in [0, 1]
    returns   int64 [out]: order[i] is the row that comes to place i; the identity where no better
              order was found

    Raises TypeError and ValueError for anything else.
    """
    check_tensor("cluster_rows", "scores", scores)
    if scores.dim() not in (2, 4):
        raise ValueError(f"cluster_rows: scores must have 2 or 4 dimensions, got {scores.dim()}")
    if not (torch.isfinite(scores).all() and (scores >= 0).all()):
        raise ValueError("cluster_rows: scores must be finite and >= 0")
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"cluster_rows: {name} must be an int of at least 1, got {size!r}")
    density = 1.0 - check_fraction("cluster_rows: sparsity", sparsity)
    present = torch.arange(len(scores), device=scores.device)
    flat = scores.detach().flatten(1) if scores.dim() == 2 else scores.detach().flatten(2).sum(2)
    view = row_view(flat.double(), height, width, density)
    return arrange([view], present) if view is not None else present


def row_view(scores: Tensor, height: int, width: int, density: float) -> View | None:
    """Return the view of scores [units, others] along the units; None where all scores are 0."""
    total = float(scores.sum())
    if total == 0:
        return None
    count = scores.shape[1]
    columns = F.pad(scores / total, (0, -count % width))
    values = columns.unflatten(1, (-1, width)).sum(2)
    widths = torch.full((values.shape[1],), width, device=scores.device)
    widths[-1] = count - (len(widths) - 1) * width
    return View(values, height, widths, round(density * scores.numel()))
