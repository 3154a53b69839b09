"""One cell of the comparison: prune, fine-tune, train the same architecture from scratch."""

from __future__ import annotations

import copy
import functools
import json
import zlib
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from liveweight import prune
from liveweight.runs.data import Dataset, load_data
from liveweight.runs.models import build_model, initialize_
from liveweight.runs.recipe import DataRecipe, TrainRecipe
from liveweight.runs.train import (
    batches,
    evaluate,
    make_optimizer,
    make_scheduler,
    order_seed,
    train_epoch,
)
from liveweight.studies import comparison_methods as methods
from liveweight.studies.grid import Cell, Row, StudyFolder

if TYPE_CHECKING:
    from liveweight.studies.comparison import ComparisonOptions

SCORING_BATCH = 250
_DROP = 0.75  # share of the epochs after which the learning rate falls
_AFRESH = 7919  # new first weights for seed s are those of seed s + 7919


class Bench:
    """The data, the training and the dense net of one seed, which many cells share."""

    def __init__(self, options: ComparisonOptions, folder: StudyFolder, seed: int) -> None:
        self.options, self.folder, self.seed = options, folder, seed
        self.data = _load_once(json.dumps(asdict(options.data)), options.device, seed)

    def build(self, seed: int | None = None) -> nn.Module:
        """Return a net with the first weights of a seed, by default of this one."""
        model = build_model(self.options.model, seed=self.seed if seed is None else seed)
        return model.to(self.options.device)

    @property
    def example(self) -> Tensor:
        return self.data.validation.inputs[:4]

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of test samples that the model has right."""
        return evaluate(model, self.data.test)[0]

    def scored(self) -> list[tuple[Tensor, Tensor]]:
        """Return the batches that criteria look at: training samples with labels."""
        train = self.data.train
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))
        chosen = order[: self.options.samples].to(train.labels.device)
        return list(batches(train.take(chosen), SCORING_BATCH))

    def train_(self, model: nn.Module, purpose: str) -> float:
        """Train under the model's masks and return the test accuracy after the last epoch.

        purpose   "fine-tune" or any other: that decides length and rate; with the seed it also
                  decides the order of samples
        """
        options = self.options
        tune = purpose == "fine-tune"
        epochs = options.fine_tune_epochs if tune else options.epochs
        recipe = TrainRecipe(
            epochs=epochs,
            batch_size=options.batch_size,
            lr=options.fine_tune_lr if tune else options.lr,
            weight_decay=options.weight_decay,
            milestones=[max(1, round(_DROP * epochs))],
        )
        optimizer = make_optimizer(model, recipe)
        scheduler = make_scheduler(optimizer, recipe)
        keeper = prune.keep_masks(model, optimizer)
        stream = zlib.crc32(purpose.encode()) % 10_000
        for epoch in range(epochs):
            order = order_seed(self.seed, stream, epoch)
            train_epoch(model, self.data.train, optimizer, recipe.batch_size, order)
            scheduler.step()
        keeper.remove()
        return self.accuracy(model)

    def dense(self) -> tuple[nn.Module, float]:
        """Return the trained dense net and its test accuracy; trained once per seed."""

        def make() -> tuple[dict[str, Tensor], dict]:
            model = self.build()
            accuracy = self.train_(model, "train")
            return dict(model.state_dict()), {"accuracy": accuracy}

        tensors, facts = self.folder.cached(f"dense-{self.seed}", make)
        model = self.build()
        model.load_state_dict(tensors)
        return model, facts["accuracy"]

    def importance(self, method: str, model: nn.Module) -> prune.Importance:
        """Return a method's importance for the dense net; costly scores are computed once."""
        options, chosen = self.options, methods.METHODS[method]
        if not chosen.scored_once:
            return chosen.make(self.seed, options.dropout_masks)

        def make() -> tuple[dict[str, Tensor], dict]:
            size = {"seed": self.seed, "masks": options.dropout_masks}
            return methods.connection_scores(method, model, self.scored(), **size), {}

        scores, _ = self.folder.cached(f"scores-{method}-{self.seed}", make)
        return methods.Given({name: t.to(options.device) for name, t in scores.items()})

    def from_scratch(self, small: nn.Module) -> float:
        """Return the accuracy of a small dense net trained from new weights; once per widths."""

        def make() -> tuple[dict[str, Tensor], dict]:
            model = copy.deepcopy(small)
            torch.manual_seed(self.seed + _AFRESH)
            accuracy = self.train_(initialize_(model), "scratch")
            return dict(model.state_dict()), {"accuracy": accuracy}

        units = "-".join(map(str, methods.widths(small)))
        return self.folder.cached(f"scratch-{units}-{self.seed}", make)[1]["accuracy"]


@functools.lru_cache(maxsize=1)
def _load_once(recipe: str, device: str, seed: int) -> Dataset:
    return load_data(DataRecipe(**json.loads(recipe)), seed).to(torch.device(device))


def run_cell(cell: Cell, options: ComparisonOptions, folder: StudyFolder) -> Row:
    """Return the row of one cell, by its method."""
    bench = Bench(options, folder, cell["seed"])
    if cell["method"] == "dense":
        return run_dense(bench)
    if cell["method"] == "quantization":
        return run_quantization(bench, cell["bits"])
    place = {"granularity": cell["granularity"], "sparsity": cell["sparsity"]}
    return run_pruning(bench, cell["method"], **place)


def run_dense(bench: Bench) -> Row:
    """Return accuracy and bytes of the dense net."""
    model, accuracy = bench.dense()
    size = methods.pruned_bytes(model)
    return {"accuracy": accuracy, "bytes": size, "parameters": size // methods.VALUE_BYTES}


def run_quantization(bench: Bench, bits: int) -> Row:
    """Return accuracy and bytes of the dense net with weights of so many bits, not trained on."""
    model, _ = bench.dense()
    rows = prune.quantize_weights_(model, bits)
    size = methods.quantized_bytes(model, rows)
    error = sum(row.error * row.weights for row in rows) / sum(row.weights for row in rows)
    return {"accuracy": bench.accuracy(model), "bytes": size, "weight_error": error}


def run_pruning(bench: Bench, method: str, granularity: str, sparsity: float) -> Row:
    """Return what pruning the dense net leaves.

    Row: weights kept of total, units of each layer, bytes, the masks' sha256; test accuracy just
    after the cut ("cut"), after fine-tuning ("fine_tuned"), of the pruned architecture trained from
    new first weights ("scratch") and, for single weights, from the dense net's own ("lottery").
    """
    model, _ = bench.dense()
    total = sum(m.weight.numel() for m in methods.weighted_layers(model).values())
    mask = methods.cut_(
        model,
        method,
        bench.importance(method, model),
        bench.scored(),
        granularity=granularity,
        sparsity=sparsity,
        # Per layer, all methods leave the same widths: one training from scratch serves all.
        scope=bench.options.scope if granularity == "weight" else "layer",
    )
    row: Row = {"mask": mask, "total": total, "cut": bench.accuracy(model)}
    if granularity == "neuron":
        model = methods.smaller(model, bench.example)
        row["scratch"] = bench.from_scratch(model)
    else:
        row |= _retrained(bench, prune.masks(model))
    layers = methods.weighted_layers(model).values()
    row["kept"] = sum(int(m.weight.count_nonzero()) for m in layers)
    row["units"] = methods.widths(model)
    row["bytes"] = methods.pruned_bytes(model)
    row["fine_tuned"] = bench.train_(model, "fine-tune")
    return row


def _retrained(bench: Bench, masks: dict[str, Tensor]) -> Row:
    """Return the accuracies of masked nets trained as long as the dense one."""
    starts = {"scratch": bench.seed + _AFRESH}
    if bench.options.lottery:
        starts["lottery"] = bench.seed
    found = {}
    for name, seed in starts.items():
        model = bench.build(seed)
        prune.apply_masks_(model, masks)
        found[name] = bench.train_(model, "scratch")
    return found
