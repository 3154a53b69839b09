"""The comparison of pruning methods: importances, granularities, retraining, quantization.

The protocol of Harang and Sanders, "Magnificent minified models", arXiv 2306.10177: every selection
method at every granularity and sparsity, each fine-tuned and trained from scratch on the pruned
architecture, and against quantization. The paper's numbers, nets, data and settings are not public;
those here are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from liveweight._check import near_misses
from liveweight.prune.select import SCOPES
from liveweight.runs.recipe import DataRecipe, RecipeError, option
from liveweight.studies.comparison_methods import METHODS
from liveweight.studies.comparison_page import render
from liveweight.studies.comparison_run import run_cell
from liveweight.studies.grid import Cell, Study, StudyOptions

NETS = ("lenet300", "lenet5")


@dataclass(frozen=True)
class ComparisonData(DataRecipe):
    """What it learns from: 12,000 training samples, so that hundreds of nets can be trained."""

    limit: int | None = option(12_000, "at most so many samples per split, stratified")


@dataclass(frozen=True)
class ComparisonOptions(StudyOptions):
    """What is compared, and how nets are trained."""

    data: ComparisonData = field(default_factory=ComparisonData)
    model: str = option("lenet300", f"one of {', '.join(NETS)}")
    methods: list[str] = option(list(METHODS), "selection methods")
    # With lenet300, 0.91 and 0.96 take the bytes of 4 and 2 bits, 0.8 of the neurons those of 6.
    sparsities: list[float] = option([0.91, 0.96, 0.99], "of single weights")
    neuron_sparsities: list[float] = option([0.5, 0.8, 0.95], "of neurons, per hidden layer")
    bits: list[int] = option([8, 6, 4, 3, 2], "of the quantized dense net")
    scope: str = option("global", "of single weights: counted over all layers, or per layer")
    samples: int = option(1000, "training samples that criteria look at")
    dropout_masks: int = option(1024, "most masks per layer for dropout damage")
    epochs: int = option(20, "of the dense net and of training from scratch")
    lr: float = option(1e-3, "of these (Adam); a tenth in the last quarter")
    fine_tune_epochs: int = option(10, "after the cut")
    fine_tune_lr: float = option(1e-3, "of these; a tenth in the last quarter")
    weight_decay: float = option(0.0, "of the optimizer")
    batch_size: int = option(120, "samples per step")
    lottery: bool = option(True, "also train masked nets from the dense net's first weights")


def cells(options: ComparisonOptions) -> list[Cell]:
    """Return all cells, seed by seed; RecipeError names an option that cannot be run."""
    _check(options)
    found: list[Cell] = []
    places = [("weight", s) for s in options.sparsities]
    places += [("neuron", s) for s in options.neuron_sparsities]
    for seed in options.seeds:
        found.append({"method": "dense", "seed": seed})
        found += [{"method": "quantization", "bits": b, "seed": seed} for b in options.bits]
        for granularity, sparsity in places:
            for method in options.methods:
                if granularity in METHODS[method].granularities:
                    place = {"granularity": granularity, "sparsity": sparsity}
                    found.append({"method": method, **place, "seed": seed})
    return found


def _check(options: ComparisonOptions) -> None:
    for name, given, known in (
        ("model", [options.model], NETS),
        ("methods", options.methods, tuple(METHODS)),
        ("scope", [options.scope], SCOPES),
    ):
        for value in given:
            if value not in known:
                hint = near_misses(str(value), known)
                raise RecipeError(f"{name}: {value!r} is not one of {', '.join(known)}: {hint}")
    for name in ("sparsities", "neuron_sparsities"):
        for value in getattr(options, name):
            if not 0 < value < 1:
                raise RecipeError(f"{name} must be between 0 and 1, got {value}")
    for value in options.bits:
        if not 2 <= value <= 8:
            raise RecipeError(f"bits must be from 2 to 8, got {value}")
    for name in ("samples", "epochs", "fine_tune_epochs", "batch_size"):
        if getattr(options, name) < 1:
            raise RecipeError(f"{name} must be 1 or more, got {getattr(options, name)}")
    masks = options.dropout_masks
    if masks < 2 or masks % 2:
        raise RecipeError(f"dropout_masks must be an even number of at least 2, got {masks}")


COMPARISON = Study(
    name="comparison",
    title="Selection methods, retraining and quantization compared",
    options=ComparisonOptions,
    cells=cells,
    run=run_cell,
    page=render,
)
