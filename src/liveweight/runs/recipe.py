"""Recipes: what a pruning run does, as dataclasses that are read from YAML and the command line."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from liveweight._check import check_fraction, near_misses
from liveweight.runs.options import RecipeError, build, option
from liveweight.runs.target.goal import Goal, parse_goal

BUILT_IN = pathlib.Path(__file__).with_name("recipes")

SOURCES = ("digits", "idx", "images", "numpy", "wav")
OPTIMIZERS = ("adam", "adamw", "sgd")
AUGMENTS = ("crop", "flip")
PRECISIONS = ("fp32", "bf16", "auto")
REWINDS = ("init", "none")
KEEPS = ("smallest", "best", "last")


@dataclass(frozen=True)
class ModelRecipe:
    """What is pruned."""

    name: str = option("lenet5", "built-in name (liveweight list models) or package.module:factory")
    arguments: dict[str, Any] = option({}, "keyword arguments of the factory")


@dataclass(frozen=True)
class DataRecipe:
    """What it learns from."""

    source: str = option("digits", f"one of {', '.join(SOURCES)}")
    path: str | None = option(
        None,
        "folder (idx; images: train/CLASS/*.png; wav: train/CLASS/*.wav or "
        "DIGIT_SPEAKER_TAKE.wav), tar archive (wav) or .npz file (numpy)",
    )
    validation: int = option(500, "samples split off train where the source has no validation set")
    channels: int = option(1, "images: 1 (grey) or 3 (RGB)")
    size: list[int] = option([], "images: resize to [height, width]; wav: [bands, frames]")
    mean: list[float] = option([], "per channel, subtracted after the scaling to [0, 1]")
    std: list[float] = option([], "per channel, divided by")
    limit: int | None = option(None, "at most so many samples per split, stratified; for trials")


@dataclass(frozen=True)
class TrainRecipe:
    """How it is trained."""

    epochs: int = option(60, "passes over the training set")
    batch_size: int = option(120, "samples per step")
    optimizer: str = option("adam", f"one of {', '.join(OPTIMIZERS)}")
    lr: float = option(1e-3, "learning rate at the start")
    momentum: float = option(0.9, "sgd only")
    weight_decay: float = option(5e-4, "of the optimizer")
    milestones: list[int] = option([30], "epochs after which lr is multiplied by gamma")
    gamma: float = option(0.1, "factor at each milestone")
    augment: list[str] = option(
        [],
        "images, drawn anew each epoch: crop (after 4 black pixels all round), flip (left-right)",
    )
    precision: str = option(
        "fp32", "fp32, bf16 (autocast), or auto: bf16 on GPUs from 8.0 and CPUs with AMX"
    )
    channels_last: bool = option(True, "layout of a model with convolutions while it is trained")


@dataclass(frozen=True)
class PruneRecipe:
    """What is removed, how often, and which result is kept."""

    importance: str = option("nnrelief", "criterion (liveweight list importances)")
    options: dict[str, Any] = option({}, "arguments of the criterion, e.g. {variant: authors}")
    alpha: float | dict[str, float] | None = option(
        None, "share of importance kept per unit: a number or {conv: 0.9, linear: 0.95}"
    )
    sparsity: float | None = option(None, "share of weights removed in the end, instead of alpha")
    target_latency: float | str | None = option(
        None,
        "seconds of one call, or a share of the fastest dense, e.g. 50%, at the first of "
        "compress.batch_sizes; a target takes the place of alpha, sparsity and keep",
    )
    target_parameters: float | str | None = option(None, "parameters left, or a share, e.g. 10%")
    target_flops: float | str | None = option(None, "FLOPs of one sample, or a share, e.g. 10%")
    granularity: str | None = option(None, "what is removed together; default: the criterion's")
    block: list[int] = option([], "granularity block: [height, width], output by input")
    pattern: list[int] = option([], "granularity vnm: [V, 2, M], without alpha and sparsity")
    scope: str = option("layer", "with sparsity: counted per layer or over all (global)")
    ignore: list[str] = option([], "layers left alone: names, globs or re:patterns")
    iterations: int = option(5, "times to prune and retrain; 0 only trains")
    samples: int = option(1000, "training samples that are scored, the same in every iteration")
    rewind: str | int = option(
        "init", "weights before retraining: init, none, or those after so many dense epochs"
    )
    keep: str = option("smallest", "smallest within tolerance, best on validation, or last")
    tolerance: float = option(1.0, "points of validation accuracy that smallest may lose")

    @property
    def targets(self) -> dict[str, float | str | None]:
        """The arguments of prune_to_ that say what to prune to."""
        names = ("target_latency", "target_parameters", "target_flops")
        return {name: getattr(self, name) for name in names}

    @property
    def goal(self) -> Goal | None:
        """The target, None where alpha, sparsity or the pattern says how much goes."""
        given = any(value is not None for value in self.targets.values())
        return parse_goal(**self.targets) if given else None


@dataclass(frozen=True)
class CompressRecipe:
    """How the kept network is made fast on this machine."""

    shrink: bool = option(True, "remove dead neurons and channels")
    formats: str = option("auto", "sparse formats to try, or auto")
    min_speedup: float = option(1.0, "a layer is swapped only from this speed-up on")
    batch_sizes: list[int] = option([1, 64], "measured batch sizes; never slower at any of them")


@dataclass(frozen=True)
class ReportRecipe:
    """What is measured and drawn in the end."""

    batch_sizes: list[int] = option([1, 64], "batch sizes of the latency table")
    torch_compile: bool = option(True, "also measure the torch.compile'd dense model")
    plots: bool = option(True, "draw plots (needs matplotlib)")


@dataclass(frozen=True)
class Recipe:
    """A pruning run: model, data, training, pruning, retraining, compression, report."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    prune: PruneRecipe = field(default_factory=PruneRecipe)
    retrain: TrainRecipe = field(default_factory=TrainRecipe)
    compress: CompressRecipe = field(default_factory=CompressRecipe)
    report: ReportRecipe = field(default_factory=ReportRecipe)
    seed: int = option(0, "of initial weights, order of samples and the pruning set")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    threads: int | None = option(None, "CPU threads; default: torch's")
    budget: str | None = option(
        None, "time for the whole run, such as 20min: fewer epochs where it needs more, and says so"
    )
    out: str | None = option(None, "run folder; default: runs/RECIPE")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def built_in_recipes() -> dict[str, pathlib.Path]:
    """Return name -> file of the recipes that ship with the package."""
    return {path.stem: path for path in sorted(BUILT_IN.glob("*.yaml"))}


def find_recipe(name: str) -> pathlib.Path:
    """Return the file of a built-in name or a path; RecipeError lists near misses."""
    known = built_in_recipes()
    if name in known:
        return known[name]
    path = pathlib.Path(name)
    if path.is_file():
        return path
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    raise RecipeError(f"recipe {name!r} is neither a file nor built in: {near_misses(name, known)}")


def from_dict(values: dict[str, Any]) -> Recipe:
    """Build a Recipe from nested keys, check every value, and return it; RecipeError otherwise."""
    recipe = build(values, Recipe)
    check_values(recipe)
    return recipe


def _demand(condition: bool, key: str, value: Any, wanted: str) -> None:
    if not condition:
        raise RecipeError(f"{key} must be {wanted}, got {value!r}")


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(
            f"{key} must be one of {', '.join(known)}, got {value!r}: "
            f"{near_misses(str(value), known, 1)}"
        )


def check_values(recipe: Recipe) -> None:
    """Raise RecipeError for the first value that cannot be run, before any work starts."""
    _check_data(recipe.data)
    for name in ("train", "retrain"):
        _check_training(name, getattr(recipe, name))
    _check_pruning(recipe.prune)
    rewind, epochs = recipe.prune.rewind, recipe.train.epochs
    fits = isinstance(rewind, str) or 1 <= rewind <= epochs
    _demand(fits, "prune.rewind", rewind, f"init, none or an epoch of train from 1 to {epochs}")
    for key in ("compress", "report"):
        sizes = getattr(recipe, key).batch_sizes
        _demand(bool(sizes) and min(sizes) >= 1, f"{key}.batch_sizes", sizes, "numbers from 1 on")
    speedup = recipe.compress.min_speedup
    _demand(speedup >= 1, "compress.min_speedup", speedup, "1 or more: slower is never taken")
    threads = recipe.threads
    _demand(threads is None or threads >= 1, "threads", threads, "1 or more")
    _demand(0 <= recipe.seed < 2**63, "seed", recipe.seed, "in [0, 2**63)")
    check_device(recipe.device)


def _check_data(data: DataRecipe) -> None:
    _one_of("data.source", data.source, SOURCES)
    if data.source != "digits":
        _demand(bool(data.path), "data.path", data.path, f"given for data.source {data.source!r}")
    _demand(data.validation >= 1, "data.validation", data.validation, "1 or more")
    _demand(data.channels in (1, 3), "data.channels", data.channels, "1 or 3")
    _demand(
        len(data.size) in (0, 2) and all(n >= 1 for n in data.size),
        "data.size",
        data.size,
        "empty or [height, width]",
    )
    _demand(len(data.mean) == len(data.std), "data.std", data.std, "as long as data.mean")
    _demand(all(s > 0 for s in data.std), "data.std", data.std, "above 0")
    _demand(data.limit is None or data.limit >= 1, "data.limit", data.limit, "1 or more")


def _check_training(name: str, train: TrainRecipe) -> None:
    _one_of(f"{name}.optimizer", train.optimizer, OPTIMIZERS)
    _demand(train.epochs >= 1, f"{name}.epochs", train.epochs, "1 or more")
    _demand(train.batch_size >= 1, f"{name}.batch_size", train.batch_size, "1 or more")
    _demand(train.lr > 0 and math.isfinite(train.lr), f"{name}.lr", train.lr, "above 0")
    _demand(train.weight_decay >= 0, f"{name}.weight_decay", train.weight_decay, "0 or more")
    _demand(train.gamma > 0, f"{name}.gamma", train.gamma, "above 0")
    _demand(0 <= train.momentum < 1, f"{name}.momentum", train.momentum, "in [0, 1)")
    _one_of(f"{name}.precision", train.precision, PRECISIONS)
    for augment in train.augment:
        _one_of(f"{name}.augment", augment, AUGMENTS)


def _check_pruning(prune: PruneRecipe) -> None:
    given = (prune.alpha is not None) + (prune.sparsity is not None)
    if _has_goal(prune):
        _demand(not prune.pattern, "prune.pattern", prune.pattern, "empty with a target")
    elif given != (0 if prune.pattern else 1) and prune.iterations:
        if prune.pattern:
            raise RecipeError("prune.pattern says how much is kept: leave out alpha and sparsity")
        raise RecipeError(
            "prune: give either alpha or sparsity, "
            f"got alpha={prune.alpha!r}, sparsity={prune.sparsity!r}"
        )
    shares = prune.alpha if isinstance(prune.alpha, dict) else {"": prune.alpha}
    for kind, share in {**shares, "sparsity": prune.sparsity}.items():
        key = "prune.sparsity" if kind == "sparsity" else f"prune.alpha.{kind}".rstrip(".")
        if share is not None:
            try:
                check_fraction(key, share)
            except TypeError as error:
                raise RecipeError(str(error)) from None
            except ValueError as error:
                raise RecipeError(str(error)) from None
    for key, sizes, count in (("block", prune.block, 2), ("pattern", prune.pattern, 3)):
        fits = not sizes or (len(sizes) == count and all(n >= 1 for n in sizes))
        _demand(fits, f"prune.{key}", sizes, f"empty or {count} numbers from 1 on")
    _demand(prune.iterations >= 0, "prune.iterations", prune.iterations, "0 or more")
    _demand(prune.samples >= 1, "prune.samples", prune.samples, "1 or more")
    _demand(prune.tolerance >= 0, "prune.tolerance", prune.tolerance, "0 or more")
    if isinstance(prune.rewind, str):
        _one_of("prune.rewind", prune.rewind, REWINDS)
    _one_of("prune.keep", prune.keep, KEEPS)
    _one_of("prune.scope", prune.scope, ("layer", "global"))


def _has_goal(prune: PruneRecipe) -> bool:
    try:
        return prune.goal is not None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"prune: {error}") from None


def check_device(name: str) -> torch.device:
    """Return the torch.device of a name; RecipeError when it is unknown or not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
