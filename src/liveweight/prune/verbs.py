"""score and prune_: the two verbs that look at data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from liveweight._graph import Graph, GraphError, trace
from liveweight.prune import residual
from liveweight.prune.activity import observe
from liveweight.prune.batches import Batches
from liveweight.prune.cut import cut_layers
from liveweight.prune.importances import (
    SCORED,
    Importance,
    Target,
    resolve_importance,
)
from liveweight.prune.mask import absorb_, own_mask
from liveweight.prune.passes import ALL_KINDS, Scoring, check_data, phases, run_pass
from liveweight.prune.plan import Plan, drop_unread
from liveweight.prune.report import LayerRow, PruneReport, Scores
from liveweight.prune.select import Rule, parse_rule
from liveweight.prune.selectors import Selector, choose_layers, layer_kind
from liveweight.prune.snapshot import restoring
from liveweight.prune.structure import Neurons, check_granularity, kept_mass, parse_structure
from liveweight.prune.whole_units import check_units, output_layers

Sizes = tuple[int, ...] | dict[str, tuple[int, ...]]
Selectors = Selector | Iterable[Selector] | None


def check_model(model: object) -> None:
    """Raise TypeError for anything but a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def make_targets(
    chosen: dict[str, nn.Module], importance: Importance, granularity: str | None
) -> dict[str, Target]:
    """Return what is scored of each layer: its weights or its kernels."""
    targets = {}
    for name, module in chosen.items():
        kind = layer_kind(module)
        # Blocks and panels are made of what the importance scores by itself.
        own = granularity not in SCORED
        by = importance.default_granularity(kind) if own else granularity
        if by == "neuron":  # units are made of what is least
            by = "kernel"
        # A Linear has no kernels: its connections are its weights.
        targets[name] = Target(name, module, kind, "weight" if kind == "linear" else by)
    return targets


def check_any(targets: dict[str, Target], left: dict[str, str]) -> None:
    """Raise ValueError with the reasons where no layer is left to work on."""
    if not targets:
        why = "; ".join(f"'{name}': {reason}" for name, reason in left.items())
        raise ValueError(
            f"no layer to work on: {why or 'the model has no nn.Linear and no nn.Conv2d'}"
        )


def score(
    model: nn.Module,
    data: Iterable | None = None,
    *,
    importance: str | Importance = "nnrelief",
    granularity: str | None = None,
    layers: Selectors = None,
    ignore: Selectors = None,
    steps: int | None = None,
) -> Scores:
    """Score every connection or kernel of the model's Linear and Conv2d layers; nothing changes.

    data          any iterable of batches: tensors, tuples whose first item is the input, or dicts
                  (model(**batch)); `steps` bounds how many are taken
    importance    a registered name or an object after prune.Importance
    granularity   "weight", "kernel" (2-D slices of a convolution) or "neuron" (whole units, [out]);
                  default: the importance's own
    layers        only these; ignore: not these. Names, globs, "re:...", module types
    returns       {layer name: [out, in], or [out, in, r, s] for single conv weights}: float32,
                  float64 for float64 layers

    One pass over the data in eval mode, one read of each layer's input.
    Raises ValueError for empty data, data on another device, NaN activations (the layer is named),
    a selector that matches nothing, and unknown names; TypeError for wrong types.
    """
    check_model(model)
    importance = resolve_importance(importance)
    check_data(importance, data)
    check_granularity(granularity, (*SCORED, "neuron"))
    granularity = check_units(importance, granularity)
    chosen, left, notes = choose_layers(model, layers, ignore)
    targets = make_targets(chosen, importance, granularity)
    check_any(targets, left)
    scoring = Scoring(importance, targets)
    if scoring.watches:
        scoring.called |= observe(model, scoring.watches, Batches(data, steps))
    scoring.collect(model, None if data is None else Batches(data, steps))
    found = Scores()
    found.importance = importance.name
    for name, layer_score in scoring.scores().items():
        found[name] = layer_score.weight
        if layer_score.bias is not None:
            found.bias[name] = layer_score.bias
        found.kinds[name], found.granularity[name] = targets[name].kind, targets[name].granularity
        if granularity == "neuron":
            weights = layer_score.between_units().weight
            found[name] = Neurons().sums(weights)[0].to(weights.dtype)
            found.granularity[name] = granularity
    idle = {name: "never called with this data" for name in targets if name not in scoring.called}
    found.notes = [f"'{n}' left alone: {why}" for n, why in (left | idle).items()] + notes
    return found


def prune_(
    model: nn.Module,
    data: Iterable | None = None,
    *,
    importance: str | Importance = "nnrelief",
    alpha: float | dict[str, float] | None = None,
    sparsity: float | None = None,
    granularity: str | None = None,
    block: Sizes | None = None,
    pattern: Sizes | None = None,
    scope: str = "layer",
    layers: Selectors = None,
    ignore: Selectors = None,
    steps: int | None = None,
    dry_run: bool = False,
) -> PruneReport:
    """Set the least important weights to zero and attach masks; what is pruned stays pruned.

    What is kept keeps its value, but under the importances "obs" and "sparsegpt", which refit it.

    alpha        share of every unit's score mass to keep, or {"conv": ..., "linear": ...}
    sparsity     share of the weights to remove, counted per layer or over all (scope="global")
    granularity  "weight" or "kernel", default: the importance's own; "block": whole blocks of
                 weights, of a convolution of kernels; "vnm": panels that sparse tensor cores read;
                 "neuron": whole units with their biases and BatchNorm entries, but for those of the
                 model's output (alpha then holds per layer). These add up what the importance
                 scores by default
    block        (height, width) in output by input features or channels, for "block"; the last
                 blocks may be smaller. alpha then holds per row of blocks, biases do not compete;
                 under sparsity a layer keeps at least one block (scope="layer")
    pattern      (V, 2, M), M >= 4, for "vnm", without alpha and sparsity: per panel of V rows the 4
                 of each M columns of the largest summed score, then per row the best 2 of these;
                 (1, 2, 4) is 2:4. Layers whose inputs M does not divide are left alone
                 block and pattern may be dicts by kind, as alpha
    dry_run      report only: the model stays as it is, bit for bit
    Other arguments as in `score`. A mass rule lets biases compete where the importance scores them;
    a sparsity counts and removes weights only. Calls add up: iterate prune_ and retraining under
    `keep_masks`. NNrelief with both kinds of layers takes two passes (Linears see the pruned
    convolutions).

    returns      PruneReport: .layers, .density, .compression, .notes, .table(), .to_json(); with
                 blocks or panels, the share of the score's sum kept beside the best possible

    Raises as `score`, and ValueError where both or neither of alpha and sparsity are given, one is
    outside [0, 1], or block or pattern is missing, unusable or without its granularity. A failure
    leaves weights, buffers, BatchNorm and modules as they were.
    """
    check_model(model)
    importance = resolve_importance(importance)
    granularity = check_units(importance, granularity)
    structure = parse_structure(granularity, block, pattern)
    rule = parse_rule(alpha, sparsity, scope, structure)
    check_data(importance, data)
    chosen, left, notes = choose_layers(model, layers, ignore)
    targets = make_targets(chosen, importance, granularity)
    left |= {n: why for n, t in targets.items() if (why := rule.why_not(t))}
    if granularity == "neuron":
        left |= output_layers(model, targets)
    targets = {n: t for n, t in targets.items() if n not in left}
    check_any(targets, left)
    with restoring(model, always=dry_run):
        for module in model.modules():
            absorb_(module)
        plan = Plan(model, targets)
        more = _fill(plan, importance, rule, data, steps, left)
        more += _cut_through(model) if rule.structure is not None else []
        report = _report(plan, importance, rule, left, notes + more)
    report.dry_run = dry_run
    return report


def _cut_through(model: nn.Module) -> list[str]:
    cut = cut_layers(model)
    if not cut:
        return []
    return [
        f"nothing of the input reaches '{cut[0]}' any more: it reads only what the layers before "
        "it no longer compute; keep more, or take smaller blocks"
    ]


def _trace_for(model: nn.Module, importance: Importance, rule: Rule) -> tuple[Graph | None, list]:
    by_mass = rule.alpha is not None and (
        getattr(importance, "dead_units", False) or getattr(importance, "residual", False)
    )
    if not by_mass and not getattr(importance, "cleanup", False) and not rule.removes_units:
        return None, []
    try:
        return trace(model), []
    except GraphError as error:
        return None, [f"no rule for dead units, shortcuts and clean-up was applied: {error}"]


def _fill(
    plan: Plan,
    importance: Importance,
    rule: Rule,
    data: Iterable | None,
    steps: int | None,
    left: dict[str, str],
) -> list[str]:
    """Decide and write everything; return notes. `left` learns of layers that were never called."""
    graph, notes = _trace_for(plan.model, importance, rule)
    order = phases(importance, plan.targets, rule.scope)
    batches = None if data is None else Batches(data, steps, passes=len(order))
    for kinds in order:
        targets = {n: t for n, t in plan.targets.items() if t.kind in kinds}
        called, more = run_pass(plan, targets, importance, rule, graph, batches)
        notes += more
        left |= {n: "never called with this data" for n in targets if n not in called}
        _write(plan, graph, kinds)
    if graph is not None and getattr(importance, "cleanup", False):
        shortcuts = _kept_shortcuts(plan, graph)
        drop_unread(plan, graph, shortcuts)
        plan.shortcuts |= shortcuts
        _write(plan, graph, ALL_KINDS)
    return notes


def _kept_shortcuts(plan: Plan, graph: Graph) -> dict[str, torch.Tensor]:
    """Kept channels of every shortcut that has a mask or could get one, by block name."""
    found = {}
    for block in graph.residual_blocks:
        mask = residual.find_shortcut_mask(plan.model, block)
        if mask is not None:
            found[block.name] = mask.mask.clone()
        elif residual.can_mask_shortcut(block):
            conv2 = plan.model.get_submodule(block.conv2)
            found[block.name] = torch.ones(
                conv2.out_channels, dtype=torch.bool, device=conv2.weight.device
            )
    return found


def _write(plan: Plan, graph: Graph | None, kinds: tuple[str, ...]) -> None:
    plan.apply_(kinds)
    for block in graph.residual_blocks if graph is not None else ():
        kept = plan.shortcuts.get(block.name)
        if kept is None or kept.all():
            continue
        earlier = residual.find_shortcut_mask(plan.model, block)
        kept = kept if earlier is None else kept & earlier.mask
        residual.attach_shortcut_mask_(plan.model, block, kept)


def _row(name: str, module: nn.Module, granularity: str, note: str) -> LayerRow:
    weight = own_mask(module, "weight")
    bias = own_mask(module, "bias")
    bias_total = 0 if module.bias is None else module.bias.numel()
    kept = module.weight.numel() if weight is None else int(weight.sum())
    dead = 0
    if weight is not None:
        live = weight.flatten(1).any(1)
        if bias_total:
            live = live | (torch.ones_like(live) if bias is None else bias)
        dead = int((~live).sum())
    return LayerRow(
        name, layer_kind(module), granularity, module.weight.numel(), kept,
        bias_total, bias_total if bias is None else int(bias.sum()), dead, note,
    )  # fmt: skip


def _describe(plan: Plan, rule: Rule, row: LayerRow) -> None:
    """Fill in what a structure adds to a layer's row."""
    structure = rule.of(plan.targets[row.name])
    if structure is None:
        return
    row.granularity = str(structure)
    row.kept_mass, row.best_mass = kept_mass(plan.scored[row.name], plan.keeps[row.name].weight)
    asked = rule.scope == "layer" and rule.sparsity is not None and rule.sparsity < 1
    if asked and row.kept > round((1 - rule.sparsity) * row.total):
        row.note = "one block is the least that a layer keeps"


def _report(
    plan: Plan, importance: Importance, rule: Rule, left: dict[str, str], notes: list[str]
) -> PruneReport:
    rows = []
    for name, module in plan.model.named_modules():
        if layer_kind(module) is None or not isinstance(module.weight, torch.Tensor):
            continue
        if nn.parameter.is_lazy(module.weight):
            continue
        target = plan.targets.get(name)
        by = target.granularity if target is not None and name not in left else "-"
        note = f"left alone: {left[name]}" if name in left else ""
        rows.append(_row(name, module, by, note))
        if target is not None and name not in left:
            _describe(plan, rule, rows[-1])
    return PruneReport(importance.name, str(rule), rows, notes)
