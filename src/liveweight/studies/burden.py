"""Neural burden of a vision transformer pruned while it trains, with and without relief."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from liveweight import prune
from liveweight.runs.data import Dataset, load_data
from liveweight.runs.models import build_model
from liveweight.runs.recipe import DataRecipe, RecipeError, TrainRecipe, option
from liveweight.runs.train import batches, evaluate, make_optimizer, order_seed, train_epoch
from liveweight.studies.burden_page import page
from liveweight.studies.grid import Cell, Row, Study, StudyFolder, StudyOptions

RELIEFS = ("none", "merge", "dynamic", "both")
DENSE_LAYERS = ("embed", "head")  # as is usual: the first and the last layer stay dense


@dataclass(frozen=True)
class BurdenOptions(StudyOptions):
    """What is trained, and how far it is pruned on the way."""

    seeds: list[int] = option([0, 1], "one training from scratch each")
    data: DataRecipe = field(default_factory=DataRecipe)
    sparsities: list[float] = option([0.8, 0.9, 0.95], "shares of the blocks' weights removed")
    scope: str = option("layer", "sparsity counted per layer or over all (global)")
    patch: int = option(7, "side of a patch; the images' side is a multiple of it")
    width: int = option(64, "of the transformer's four blocks")
    merge: float = option(0.5, "relief merge: share of the patch tokens merged away, at most 0.5")
    merge_block: int = option(0, "the block after whose attention they are merged, from 0")
    epochs: int = option(10, "passes over the training set, dense and pruned alike")
    batch_size: int = option(100, "samples per step")
    lr: float = option(2e-3, "highest learning rate: a linear warm-up of 10 %, then a cosine to 0")
    weight_decay: float = option(0.05, "of AdamW")
    begin: float = option(0.1, "share of the training after which pruning begins")
    end: float = option(0.6, "share of the training after which the sparsity is reached")
    every: int = option(25, "steps from one drawing of masks to the next")
    samples: int = option(500, "validation samples on which burden is measured")


def cells(options: BurdenOptions) -> list[Cell]:
    """Return, per seed, two dense nets (plain and merging), then sparsity x relief."""
    _check(options)
    grid = [(0.0, "none"), (0.0, "merge")]
    grid += [(sparsity, relief) for sparsity in options.sparsities for relief in RELIEFS]
    return [
        {"sparsity": sparsity, "relief": relief, "seed": seed}
        for seed in options.seeds
        for sparsity, relief in grid
    ]


def _check(options: BurdenOptions) -> None:
    given = options.sparsities
    if not given or len(set(given)) < len(given) or not all(0 < s < 1 for s in given):
        raise RecipeError(f"sparsities must be different numbers inside (0, 1), got {given}")
    if not 0 <= options.begin < options.end <= 1:
        raise RecipeError(
            f"expected 0 <= begin < end <= 1, got begin {options.begin}, end {options.end}"
        )
    if not 0 < options.merge <= 0.5:
        raise RecipeError(f"merge must be in (0, 0.5], got {options.merge}")
    if options.scope not in ("layer", "global"):
        raise RecipeError(f"scope must be layer or global, got {options.scope!r}")
    for name in ("epochs", "batch_size", "every", "samples"):
        if getattr(options, name) < 1:
            raise RecipeError(f"{name} must be 1 or more, got {getattr(options, name)}")
    if not options.lr > 0:
        raise RecipeError(f"lr must be above 0, got {options.lr}")


def run(cell: Cell, options: BurdenOptions, folder: StudyFolder) -> Row:
    """Train one net, dense or pruned on the way, and weigh it against its dense twin.

    The twin starts from the same weights, sees the same batches, and merges where the net does.
    """
    data = _data(json.dumps(asdict(options.data)), options.device)
    merging = cell["relief"] in ("merge", "both")
    seed, twin = cell["seed"], _build(options, data, merging, cell["seed"])

    def make_twin():
        loss = _train(twin, data, options, seed)
        return dict(twin.state_dict()), {"train_loss": loss}

    tensors, facts = folder.cached(f"dense-{'merge' if merging else 'plain'}-{seed}", make_twin)
    twin.load_state_dict(tensors)
    if cell["sparsity"] == 0:
        return facts | _measure(twin, twin, data, options)
    model = _build(options, data, merging, seed)
    gradual = _Gradual(model, options, cell, _steps(options, data))
    loss = _train(model, data, options, seed, gradual)
    return {
        "train_loss": loss,
        **_measure(model, twin, data, options),
        "burden_cut": _cut(twin, data, options, cell["sparsity"]),
        "returned": gradual.returned(),
        "mask": _digest(prune.masks(model)),
    }


@functools.lru_cache(maxsize=1)
def _data(recipe: str, device: str) -> Dataset:
    """Return the data: read once per process, and the same for every seed."""
    return load_data(DataRecipe(**json.loads(recipe))).to(torch.device(device))


def _build(options: BurdenOptions, data: Dataset, merging: bool, seed: int) -> nn.Module:
    shape = data.train.inputs.shape[1:]
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"the study needs square images [C, S, S], got inputs {list(shape)}")
    arguments = {
        "size": shape[1],
        "channels": shape[0],
        "classes": len(data.classes),
        "patch": options.patch,
        "width": options.width,
        "merge": options.merge if merging else 0.0,
        "merge_block": options.merge_block,
    }
    return build_model("vit4", arguments, seed).to(options.device)


def _steps(options: BurdenOptions, data: Dataset) -> int:
    return options.epochs * math.ceil(len(data.train) / options.batch_size)


class _Gradual:
    """Prunes by magnitude along a cubic ramp: masks only grow, or are redrawn to the last step."""

    def __init__(self, model: nn.Module, options: BurdenOptions, cell: Cell, steps: int) -> None:
        self.model = model
        self.dynamic = cell["relief"] in ("dynamic", "both")
        begin = max(1, round(options.begin * steps))
        end = max(begin, round(options.end * steps))
        self.ramp = prune.Cubic(cell["sparsity"], begin, end, options.every)
        self.schedule = self.ramp
        if self.dynamic:
            self.schedule = prune.Then(self.ramp, options.every, steps)
        self.scope, self.pruner, self.at_end = options.scope, None, {}

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        self.pruner = prune.Pruner(
            self.model,
            optimizer,
            self.schedule,
            importance="magnitude",
            scope=self.scope,
            ignore=DENSE_LAYERS,
            regrow=self.dynamic,
        )

    def step(self) -> None:
        self.pruner.step()
        if self.pruner.count == self.ramp.last:
            self.at_end = {name: mask.clone() for name, mask in prune.masks(self.model).items()}

    def returned(self) -> float:
        """Return the share of the weights left that were dropped when the ramp ended."""
        now = prune.masks(self.model)
        back = sum(int((mask & ~self.at_end[name]).sum()) for name, mask in now.items())
        return back / max(1, sum(int(mask.sum()) for mask in now.values()))


def _train(
    model: nn.Module,
    data: Dataset,
    options: BurdenOptions,
    seed: int,
    gradual: _Gradual | None = None,
) -> float:
    """Train from scratch, pruning on the way where asked; return the last epoch's mean loss."""
    recipe = TrainRecipe(optimizer="adamw", lr=options.lr, weight_decay=options.weight_decay)
    optimizer = make_optimizer(model, recipe)
    steps = _steps(options, data)
    warm = max(1, steps // 10)

    def share(step: int) -> float:
        cosine = (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
        return (step + 1) / warm if step < warm else cosine

    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    if gradual is not None:
        gradual.start(optimizer)

    def on_step() -> None:
        rate.step()
        if gradual is not None:
            gradual.step()

    loss = 0.0
    for epoch in range(options.epochs):
        order = order_seed(seed, 0, epoch)
        loss = train_epoch(model, data.train, optimizer, options.batch_size, order, on_step)
    return loss


def _measure(model: nn.Module, twin: nn.Module, data: Dataset, options: BurdenOptions) -> Row:
    accuracy, loss = evaluate(model, data.test)
    report = _weigh(model, twin, data, options)
    whole = asdict(report.network)
    del whole["name"]
    layers = [[r.name, r.density, r.burden, r.burden_p90, r.gini] for r in report.layers]
    found = {"accuracy": accuracy, "loss": loss, **whole, "layers": layers}
    # NaN, of layers without a living unit, is no JSON.
    return json.loads(json.dumps(found), parse_constant=lambda word: None)


def _cut(twin: nn.Module, data: Dataset, options: BurdenOptions, sparsity: float) -> float:
    """Return the burden of the dense twin once pruned and not trained: what the choice alone does.

    The largest weights carry more than the mean weight of the dense net before anything adapts.
    """
    cut = copy.deepcopy(twin)
    prune.prune_(
        cut, importance="magnitude", sparsity=sparsity, scope=options.scope, ignore=DENSE_LAYERS
    )
    return _weigh(cut, twin, data, options).network.burden


def _weigh(
    model: nn.Module, twin: nn.Module, data: Dataset, options: BurdenOptions
) -> prune.BurdenReport:
    held = data.validation
    held = held.take(torch.arange(min(options.samples, len(held)), device=held.labels.device))
    return prune.burden(model, twin, list(batches(held, 500)), ignore=DENSE_LAYERS)


def _digest(masks: dict[str, torch.Tensor]) -> str:
    """Return the sha256 over names and bits of all masks."""
    digest = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        digest.update(name.encode())
        digest.update(mask.cpu().numpy().tobytes())
    return digest.hexdigest()


BURDEN = Study(
    "burden",
    "Neural burden of a vision transformer, and its relief",
    BurdenOptions,
    cells,
    run,
    page,
)
