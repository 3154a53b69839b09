"""cluster_: reorder a model's hidden units so that blocks hold more of what is worth keeping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from liveweight._check import check_fraction
from liveweight._graph import GraphError
from liveweight._graph_spaces import Space, find_spaces
from liveweight.prune import batches, permute
from liveweight.prune.activity import observe
from liveweight.prune.batches import Batches
from liveweight.prune.cluster_report import ClusterReport, ClusterRow
from liveweight.prune.importances import Importance, Target, resolve_importance
from liveweight.prune.joint import Layer, arrange_jointly
from liveweight.prune.mask import absorb_
from liveweight.prune.passes import Scoring, check_data
from liveweight.prune.plan import alive_weights
from liveweight.prune.selectors import choose_layers
from liveweight.prune.snapshot import restoring
from liveweight.prune.structure import kept_mass, parse_structure
from liveweight.prune.verbs import (
    Selectors,
    Sizes,
    check_any,
    check_model,
    make_targets,
)

# Largest difference that counts as rounding, as a fraction of the largest value: sums of some
# thousand terms in another order move by about the root of that many units in the last place.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def cluster_(
    model: nn.Module,
    data: Iterable | None = None,
    *,
    importance: str | Importance = "nnrelief",
    block: Sizes,
    sparsity: float = 0.9,
    layers: Selectors = None,
    ignore: Selectors = None,
    steps: int | None = None,
    dry_run: bool = False,
) -> ClusterReport:
    """Reorder hidden units so that prune_(granularity="block") keeps more; same function after it.

    Units that are worth keeping for the same inputs come to stand in one row of blocks, channels
    that the same units read in one column. Every order is an exact permutation, carried through
    all that counts the channels: the layers that read them, BatchNorm and LayerNorm, shortcuts,
    depthwise convolutions, masks. It costs nothing when the model runs. Outputs change by rounding
    only (sums run in another order), which is checked on the first batch.

    data, importance, layers, ignore, steps   as in `prune_`
    block      (height, width), or {"conv": (h, w), "linear": (h, w)}, as in `prune_`
    sparsity   the share that is to be removed later: what is kept at this share is made large
    dry_run    report only: the model stays as it is, bit for bit
    returns    ClusterReport: kept mass of every layer before and after, beside the best possible;
               .orders. No layer keeps less than before: where no better order was found, or a
               channel cannot be moved (it reaches the output, is concatenated, ...), the present
               one stays, with the reason

    Parameters keep their identity, and values and gradients are reordered in place; states of an
    optimizer are not, so build it afterwards. A state_dict saved before fits the old order only: do
    not rewind_ to it.

    Raises as `prune_`, and RuntimeError where the reordered model disagrees on the first batch; the
    model is then as it was.
    """
    check_model(model)
    importance = resolve_importance(importance)
    structure = parse_structure("block", block, None)
    sparsity = check_fraction("sparsity", sparsity)
    check_data(importance, data)
    chosen, left, notes = choose_layers(model, layers, ignore)
    targets = make_targets(chosen, importance, None)
    for name, target in targets.items():
        if target.kind not in structure:
            left[name] = f"block has no {target.kind!r}"
        elif reason := structure[target.kind].unfit(target):
            left[name] = reason
    targets = {n: t for n, t in targets.items() if n not in left}
    check_any(targets, left)
    feed = None if data is None else Batches(data, steps, passes=3)
    with restoring(model, always=dry_run):
        for module in model.modules():
            absorb_(module)
        spaces, reason = _spaces(model)
        notes += [f"nothing was moved: {reason}"] if reason else []
        scores = _score(model, targets, importance, feed, left)
        found = {
            n: Layer(
                targets[n].kind, score, alive, structure[targets[n].kind], targets[n].entry_size
            )
            for n, (score, alive) in scores.items()
        }
        orders = _find_orders(spaces, found, sparsity)
        if orders and not dry_run:
            _apply_(model, [(spaces[i], order) for i, order in orders.items()], feed)
    rows = [_row(name, layer, spaces, orders, sparsity) for name, layer in found.items()]
    moved = {n: order.cpu() for i, order in orders.items() for n in spaces[i].writers}
    report = ClusterReport(importance.name, sparsity, rows, moved, dry_run=dry_run)
    report.notes += [f"'{n}' left alone: {why}" for n, why in left.items()] + notes
    return report


def _spaces(model: nn.Module) -> tuple[list[Space], str]:
    try:
        spaces = find_spaces(model)
    except GraphError as error:
        return [], str(error)
    shared = permute.shared_parameters(model)
    for space in spaces:
        space.fix(permute.why_fixed(model, space, shared))
    return spaces, ""


def _score(
    model: nn.Module,
    targets: dict[str, Target],
    importance: Importance,
    feed: Batches | None,
    left: dict[str, str],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return scores and live entries of the layers that the data reaches."""
    scoring = Scoring(importance, targets)
    if scoring.watches:
        scoring.called |= observe(model, scoring.watches, feed)
    found = {}
    for name, score in scoring.scores().items():
        alive = alive_weights(targets[name])
        found[name] = torch.where(alive, score.weight, 0.0), alive
    left |= {n: "never called with this data" for n in targets if n not in found}
    return found


def _find_orders(
    spaces: list[Space], layers: dict[str, Layer], sparsity: float
) -> dict[int, Tensor]:
    for index, space in enumerate(spaces):
        for name in space.writers:
            if name in layers:
                layers[name].out_space = index
        for reader in space.readers:
            if reader.name in layers:
                layers[reader.name].in_space, layers[reader.name].fan = index, reader.fan
    movable = {i: space.channels for i, space in enumerate(spaces) if not space.fixed}
    return arrange_jointly(layers, movable, sparsity)


def _apply_(model: nn.Module, orders: list[tuple[Space, Tensor]], feed: Batches | None) -> None:
    """Reorder, and compare answers; where they differ, or anything fails, order back."""
    batch = None if feed is None else next(iter(feed))
    before = None if batch is None else _answer(model, batch)
    done: list[tuple[Space, Tensor]] = []
    try:
        for space, order in orders:
            permute.permute_(model, space, order)
            done.append((space, order))
        if batch is not None:
            _check_same(before, _answer(model, batch))
    except BaseException:
        for space, order in done:
            permute.permute_(model, space, order.argsort())
        raise


def _row(
    name: str,
    layer: Layer,
    spaces: list[Space],
    orders: dict[int, Tensor],
    sparsity: float,
) -> ClusterRow:
    after, best = kept_mass(*layer.kept(orders, sparsity))
    before = layer.mass({}, sparsity)
    row = ClusterRow(name, layer.kind, str(layer.blocks), before, after, best)
    row.units = _say(layer.out_space, spaces, orders, "its units cannot be followed")
    row.inputs = _say(layer.in_space, spaces, orders, "they are the model's or unknown")
    return row


def _say(index: int | None, spaces: list[Space], orders: dict[int, Tensor], unknown: str) -> str:
    if index is None or spaces[index].fixed:
        return f"as they were: {unknown if index is None else spaces[index].fixed}"
    return "reordered" if index in orders else "as they were: no better order was found"


def _answer(model: nn.Module, batch: object) -> object:
    with batches.evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = batches.call(model, batch, batches.model_devices(model))[0]
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, output)


def _check_same(before: object, after: object) -> None:
    """Raise RuntimeError where two answers differ by more than rounding."""
    for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
        if not isinstance(a, Tensor) or not a.is_floating_point() or not a.numel():
            continue
        # NaN and infinities of the model itself are no fault of the order.
        worst = float((a.double() - b.double()).nan_to_num(0, 0, 0).abs().max())
        largest = float(a.double().nan_to_num(0, 0, 0).abs().max())
        same = torch.equal(torch.isfinite(a), torch.isfinite(b))
        if not same or worst > _TOLERANCE.get(a.dtype, 1e-4) * max(largest, 1e-6):
            raise RuntimeError(
                "cluster_: the reordered model disagrees on the first batch: values differ by up "
                f"to {worst:.3g} where the largest is {largest:.3g}; ignore the layers that an "
                "operation treats by position"
            )
