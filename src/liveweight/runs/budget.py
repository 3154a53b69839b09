"""A time budget: epochs of a recipe scaled down by one factor, from a short trial."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from typing import TYPE_CHECKING

import torch

from liveweight.runs.phase import make_training
from liveweight.runs.recipe import Recipe, RecipeError, TrainRecipe
from liveweight.runs.train import evaluate

if TYPE_CHECKING:
    from liveweight.runs.prune_run import PruningRun

_UNITS = {"h": 3600.0, "min": 60.0, "s": 1.0}
_TRAINING = 0.9  # of the budget; the rest is for pruning, compressing and measuring
_TRIAL_S = 3.0
_VALIDATION = 1000  # samples of the trial


def parse_duration(text: str) -> float:
    """Return seconds of "20min", "90s", "1h30min" or "1.5h". RecipeError for anything else."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(h|min|s)", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not re.fullmatch(r"(\s*\d+(\.\d+)?\s*(h|min|s))+\s*", text) or not seconds > 0:
        raise RecipeError(f"budget must be a time such as 20min, 90s or 1h30min, got {text!r}")
    return seconds


def scaled(recipe: TrainRecipe, factor: float) -> TrainRecipe:
    """Return a training of factor times the epochs, at least one; milestones move along."""
    epochs = max(1, round(recipe.epochs * factor))
    moved = sorted({max(1, round(m * factor)) for m in recipe.milestones})
    return dataclasses.replace(recipe, epochs=epochs, milestones=[m for m in moved if m < epochs])


def fitted(recipe: Recipe, facts: dict | None) -> Recipe:
    """Return the recipe with the epochs that its budget allows; facts as fit_budget found them."""
    if not facts or facts["factor"] == 1:
        return recipe
    train, retrain = (scaled(r, facts["factor"]) for r in (recipe.train, recipe.retrain))
    cut = recipe.prune
    if not isinstance(cut.rewind, str):
        cut = dataclasses.replace(cut, rewind=max(1, round(cut.rewind * facts["factor"])))
    return dataclasses.replace(recipe, train=train, retrain=retrain, prune=cut)


def fit_budget(run: PruningRun) -> dict | None:
    """Return {"budget_s", "epoch_s", "planned_s", "factor"}, None without a budget.

        factor = min(1, 0.9 budget / (epochs of all phases x seconds of one epoch of the dense net))

    The trial is made once: a run that is taken up again keeps its factor.
    """
    recipe, path = run.recipe, run.folder.path / "budget.json"
    if recipe.budget is None:
        return None
    if path.is_file():
        return json.loads(path.read_text())
    budget = parse_duration(recipe.budget)
    epoch = time_epoch(run)
    epochs = recipe.train.epochs + recipe.prune.iterations * recipe.retrain.epochs
    factor = min(1.0, _TRAINING * budget / (epochs * epoch))
    facts = {"budget_s": budget, "epoch_s": epoch, "planned_s": epochs * epoch, "factor": factor}
    run.folder.write_text("budget.json", json.dumps(facts))
    return facts


def time_epoch(run: PruningRun) -> float:
    """Return seconds of one epoch of the dense net, validation included, from a few steps."""
    data, recipe = run.data, run.recipe.train
    model = run.build()
    _, train_epoch = make_training(run, model, recipe)

    def train(steps: int) -> float:
        size = min(len(data.train), steps * recipe.batch_size)
        part = data.train.take(torch.arange(size, device=data.train.labels.device))
        return _seconds(lambda: train_epoch(part, seed=0))

    train(2)  # first steps allocate and choose kernels
    steps, seconds = 4, train(4)
    whole = math.ceil(len(data.train) / recipe.batch_size)
    if seconds < _TRIAL_S and steps < whole:
        steps = min(whole, math.ceil(steps * _TRIAL_S / seconds))
        seconds = train(steps)
    held = min(len(data.validation), _VALIDATION)
    part = data.validation.take(torch.arange(held, device=data.validation.labels.device))
    checking = (
        _seconds(lambda: evaluate(model, part, run.autocast(0))) * len(data.validation) / held
    )
    return seconds * whole / min(steps, whole) + checking


def _seconds(work) -> float:
    # both kinds of work end with reading a number, which waits for a GPU
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def describe(recipe: Recipe, facts: dict) -> str:
    """Return what the budget did to the recipe as it was asked, in one sentence or two."""
    minutes = f"{facts['budget_s'] / 60:.3g} minutes"
    if facts["factor"] == 1:
        return f"The whole recipe fits the budget of {minutes}: nothing was shortened."
    short = fitted(recipe, facts)
    return (
        f"SHORTENED to a budget of {minutes}: {short.train.epochs} of {recipe.train.epochs} "
        f"epochs of training and {short.retrain.epochs} of {recipe.retrain.epochs} of every "
        f"retraining, milestones moved along; the whole recipe would take about "
        f"{facts['planned_s'] / 60:.0f} minutes here."
    )
