"""Orders for all spaces of a model at once: a layer's rows belong to one, its columns to another.

One space after the other is arranged while the others stand. In the first sweep a layer's other
axis, where it can still move, counts unit by unit and not yet in blocks; a second run counts blocks
from the start, and the better result stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liveweight.prune.arrange import View, arrange, row_view
from liveweight.prune.permute import columns
from liveweight.prune.select import best_blocks
from liveweight.prune.structure import Blocks

_SWEEPS = 4
_ATTEMPTS = 4
_ROUNDING = 1e-9  # of a sum that runs in another order
_ENOUGH = 1e-4


@dataclass
class Layer:
    """Scores of one layer, and the spaces that its rows and its columns belong to.

    scores     [out, in] or [out, in, r, s], 0 where nothing is left; alive: where something is
    entry_size weights per score
    out_space  index of the space of its units, in_space of its inputs; None where there is none
    fan        input features per channel of in_space
    """

    kind: str
    scores: Tensor
    alive: Tensor
    blocks: Blocks
    entry_size: int = 1
    out_space: int | None = None
    in_space: int | None = None
    fan: int = 1

    def __post_init__(self) -> None:
        three = self.scores.dim() > 2
        self.flat = self.scores.flatten(2).sum(2) if three else self.scores  # [out, in]
        self.live = self.alive.flatten(2).sum(2) if three else self.alive
        self.area = self.blocks.sums(torch.ones_like(self.flat))

    def ordered(self, tensor: Tensor, orders: dict[int, Tensor]) -> Tensor:
        """Return scores or live entries under some orders; a space without one stands still."""
        if self.out_space in orders:
            tensor = tensor[orders[self.out_space]]
        if self.in_space in orders:
            tensor = tensor[:, columns(orders[self.in_space], self.fan)]
        return tensor

    def mass(self, orders: dict[int, Tensor], sparsity: float) -> float:
        """Return the share of the scores' sum that blocks keep under some orders."""
        sums = self.blocks.sums(self.ordered(self.flat, orders))
        total = float(sums.sum())
        return float(sums[self._best(sums, orders, sparsity)].sum()) / total if total else 1.0

    def kept(self, orders: dict[int, Tensor], sparsity: float) -> tuple[Tensor, Tensor]:
        """Return the scores under some orders, and what prune_ would keep of them."""
        sums = self.blocks.sums(self.ordered(self.flat, orders))
        scores, alive = (self.ordered(t, orders) for t in (self.scores, self.alive))
        mask = self.blocks.spread(self._best(sums, orders, sparsity), scores.shape)
        return scores, mask & alive

    def _best(self, sums: Tensor, orders: dict[int, Tensor], sparsity: float) -> Tensor:
        sizes = self.blocks.sums(self.ordered(self.live, orders)) * self.entry_size
        budget = round((1.0 - sparsity) * self.scores.numel() * self.entry_size)
        return best_blocks(sums / self.area, sizes, budget, sparsity)

    def views(
        self, space: int, orders: dict[int, Tensor], density: float, loose: bool
    ) -> list[View | None]:
        """Return what the layer says about the order of a space, rows in their unmoved order.

        loose   the other axis counts unit by unit where it can move
        """
        flat, found = self.flat, []
        if space == self.out_space:
            free = loose and self.in_space in orders and self.in_space != space
            others = orders.get(self.in_space)
            rows = flat if others is None else flat[:, columns(others, self.fan)]
            width = self.fan if free else self.blocks.width
            found.append(row_view(rows, self.blocks.height, width, density))
        if space == self.in_space and self.blocks.width % self.fan == 0:
            free = loose and self.out_space in orders and self.out_space != space
            others = orders.get(self.out_space)
            rows = flat if others is None else flat[others]
            rows = rows.unflatten(1, (-1, self.fan)).sum(2).T
            height = 1 if free else self.blocks.height
            found.append(row_view(rows, self.blocks.width // self.fan, height, density))
        return found


def arrange_jointly(
    layers: dict[str, Layer], units: dict[int, int], sparsity: float
) -> dict[int, Tensor]:
    """Return orders of spaces, index -> int64 [units], under which no layer keeps less than now.

    All layers count alike. Where one would lose, it counts four times as much and all is arranged
    again; after some attempts the spaces of a loser stay as they are.

    units   channels of the spaces that can move, by index. Spaces that stay as they are, or that no
            layer has a say about, are left out.
    """
    device = next((layer.scores.device for layer in layers.values()), torch.device("cpu"))
    touched = {s for layer in layers.values() for s in (layer.out_space, layer.in_space)}
    present = {s: torch.arange(n, device=device) for s, n in units.items() if s in touched}
    before = {n: layer.mass({}, sparsity) for n, layer in layers.items()}
    weights = dict.fromkeys(layers, 1.0)
    best, most = {}, sum(before.values())
    for _ in range(_ATTEMPTS if present else 0):
        orders = _sweep(layers, present, weights, sparsity)
        losers = _losers(layers, orders, before, sparsity)
        orders = _without_losers(layers, orders, before, sparsity)
        if (kept := _total(layers, orders, sparsity)) > most:
            best, most = orders, kept
        if not losers:
            break
        for name in losers:
            weights[name] *= 4.0
    return {s: o for s, o in best.items() if not torch.equal(o, present[s])}


def _sweep(
    layers: dict[str, Layer],
    present: dict[int, Tensor],
    weights: dict[str, float],
    sparsity: float,
) -> dict[int, Tensor]:
    """Arrange one space after the other, again and again; return the best orders on the way."""
    best, most = present, _total(layers, present, sparsity, weights)
    for loosely in (True, False):
        orders, last = dict(present), -1.0
        for sweep in range(_SWEEPS):
            for space in orders:
                found = [
                    replace(view, values=view.values * weights[name])
                    for name, layer in layers.items()
                    for view in layer.views(space, orders, 1.0 - sparsity, loosely and sweep == 0)
                    if view is not None
                ]
                orders[space] = arrange(found, orders[space])
            kept = _total(layers, orders, sparsity, weights)
            if kept > most:
                best, most = dict(orders), kept
            if sweep and kept < last + _ENOUGH:
                break
            last = kept
    return best


def _total(
    layers: dict[str, Layer],
    orders: dict[int, Tensor],
    sparsity: float,
    weights: dict[str, float] | None = None,
) -> float:
    return sum(
        layer.mass(orders, sparsity) * (1.0 if weights is None else weights[name])
        for name, layer in layers.items()
    )


def _loss(layer: Layer, orders: dict[int, Tensor], before: float, sparsity: float) -> float:
    return before - layer.mass(orders, sparsity)


def _losers(
    layers: dict[str, Layer],
    orders: dict[int, Tensor],
    before: dict[str, float],
    sparsity: float,
) -> list[str]:
    """Return the layers that keep less than before, the one that lost most first."""
    losses = {n: _loss(layer, orders, before[n], sparsity) for n, layer in layers.items()}
    return sorted((n for n in losses if losses[n] > _ROUNDING), key=lambda n: -losses[n])


def _without_losers(
    layers: dict[str, Layer],
    orders: dict[int, Tensor],
    before: dict[str, float],
    sparsity: float,
) -> dict[int, Tensor]:
    """Take back the order of an axis of the layer that lost most, until no layer loses."""
    orders = dict(orders)
    while losers := _losers(layers, orders, before, sparsity):
        worst = layers[losers[0]]
        taken = {worst.out_space, worst.in_space} & set(orders)
        left = {s: {k: o for k, o in orders.items() if k != s} for s in taken}
        # Of its two axes, the one without which it loses less; then, all together keep more.
        loss = {s: max(_loss(worst, o, before[losers[0]], sparsity), 0.0) for s, o in left.items()}
        orders = left[min(taken, key=lambda s: (loss[s], -_total(layers, left[s], sparsity)))]
    return orders
