"""The pruning run: train dense, then prune, rewind and retrain, again and again; then finish.

Every phase (0: dense, i: iteration i) keeps its best epoch on the validation set. The test set is
not looked at here: it is opened in finish.py, after the model to keep has been chosen.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy
import torch
from torch import Tensor, nn

from liveweight import prune
from liveweight._check import near_misses
from liveweight.compress.measure import torch_threads
from liveweight.runs.budget import describe, fit_budget, fitted, parse_duration
from liveweight.runs.data import Dataset, load_data
from liveweight.runs.folder import RunFolder
from liveweight.runs.models import build_model
from liveweight.runs.phase import Phase
from liveweight.runs.pipeline import autocast_type
from liveweight.runs.progress import Reporter
from liveweight.runs.recipe import PruneRecipe, Recipe, RecipeError, TrainRecipe, check_device
from liveweight.runs.target.prune_to import prune_to_
from liveweight.runs.train import batches

SCORING_BATCH = 250


def execute(
    recipe: Recipe,
    out: str | pathlib.Path,
    reporter: Reporter | None = None,
    on_epoch: Callable[[int, int], None] = lambda iteration, epoch: None,
) -> RunFolder:
    """Run a recipe in the folder out, or take up the run that was interrupted there.

    on_epoch(iteration, epoch) is called after each epoch whose state is on disk. RecipeError,
    ValueError: the recipe, the data or the folder cannot be used; nothing was trained then.
    """
    from liveweight.runs.finish import finish

    with torch_threads(recipe.threads):
        with denormals_flushed():
            run = PruningRun(recipe, out, reporter or Reporter(), on_epoch)
            for iteration in range(run.folder.iterates_done(), recipe.prune.iterations + 1):
                run.run_phase(iteration)
        finish(run)
    return run.folder


@contextlib.contextmanager
def denormals_flushed() -> Iterator[None]:
    """Round numbers below 1.2e-38 to zero meanwhile.

    Weight decay drives unused weights and their moments there, and CPUs then compute many times
    slower: LeNet-5 epochs went from 11 s to over 100 s. A dense net full of denormals would also be
    an unfairly slow thing to compare with. Worker threads take the setting from the thread that
    starts them, so those that already run keep theirs.
    """
    for kind in (numpy.float32, numpy.float64):
        numpy.finfo(kind)  # measured once and remembered; numpy warns if that happens in here
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def make_importance(recipe: PruneRecipe) -> object:
    """Return the criterion a recipe names, built with its options."""
    if recipe.importance not in prune.importances:
        raise RecipeError(
            f"prune.importance {recipe.importance!r} is not registered: "
            f"{near_misses(recipe.importance, prune.importances)}"
        )
    try:
        return prune.importances[recipe.importance](**recipe.options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"prune.options of {recipe.importance!r}: {error}") from error


def structure_arguments(recipe: PruneRecipe) -> dict:
    """Return granularity, block and pattern for prune_; RecipeError where it would refuse them."""
    found = {"granularity": recipe.granularity} if recipe.granularity is not None else {}
    found |= {k: tuple(v) for k in ("block", "pattern") if (v := getattr(recipe, k))}
    try:
        prune.check_structure(**found)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"prune: {error}") from error
    return found


def step_sparsity(final: float, iteration: int, iterations: int) -> float:
    """Return the sparsity after an iteration: 1 - (1 - final)^(iteration / iterations).

    Each iteration removes the same share of what is left (Frankle & Carbin, 2019).
    """
    return 1 - (1 - final) ** (iteration / iterations)


class PruningRun:
    """A recipe, its data and its folder; runs one phase at a time."""

    def __init__(
        self,
        recipe: Recipe,
        out: str | pathlib.Path,
        reporter: Reporter,
        on_epoch: Callable[[int, int], None] = lambda iteration, epoch: None,
    ) -> None:
        self.recipe = self.asked = recipe  # a budget makes a shorter one of what was asked
        self.reporter, self.on_epoch = reporter, on_epoch
        self.device = check_device(recipe.device)
        if recipe.prune.iterations:
            make_importance(recipe.prune)
            structure_arguments(recipe.prune)
        if recipe.budget is not None:
            parse_duration(recipe.budget)
        self.data: Dataset = load_data(recipe.data, recipe.seed).to(self.device)
        self.build()  # names a bad model or bad arguments before the folder is made
        check_output(self.build(), self.data)
        self.folder = RunFolder.open(out, recipe)
        self.budget = fit_budget(self)
        if self.budget is not None:
            reporter.say(describe(recipe, self.budget))
            self.recipe = fitted(recipe, self.budget)

    def build(self) -> nn.Module:
        """Return the model with its first weights."""
        model = self.recipe.model
        return build_model(model.name, model.arguments, self.recipe.seed).to(self.device)

    def training(self, iteration: int) -> TrainRecipe:
        """Return how a phase trains."""
        return self.recipe.retrain if iteration else self.recipe.train

    def autocast(self, iteration: int) -> torch.dtype | None:
        """Return the type that a phase trains and is validated in; None: float32."""
        return autocast_type(self.training(iteration).precision, self.device)

    def load(self, iteration: int) -> tuple[nn.Module, dict]:
        """Return the best model of a finished phase, masks attached, and its facts."""
        tensors, facts = self.folder.load_tensors(f"iterates/{iteration:02d}")
        model = self.build()
        prune.load_state_(model, tensors)
        return model, facts

    def pruning_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return what is scored, (inputs, labels): the same training samples each iteration."""
        order = torch.randperm(
            len(self.data.train), generator=torch.Generator().manual_seed(self.recipe.seed)
        )
        chosen = self.data.train.take(order[: self.recipe.prune.samples].to(self.device))
        return list(batches(chosen, SCORING_BATCH))

    def run_phase(self, iteration: int) -> None:
        """Train (0) or prune and retrain (1...) and write the best epoch as an iterate."""
        state = self.folder.load_state()
        if state is not None and state["iteration"] != iteration:
            state = None
        title = "train dense" if iteration == 0 else f"prune and retrain {iteration}"
        if iteration:
            title += f"/{self.recipe.prune.iterations}"
        recipe = self.training(iteration)
        with self.reporter.phase(title, recipe.epochs, state["epoch"] if state else 0):
            phase = Phase(self, iteration, recipe, state)
            while phase.epoch < recipe.epochs:
                phase.run_epoch()
                self.on_epoch(iteration, phase.epoch)
            phase.close()

    def prune(self, model: nn.Module, iteration: int) -> dict:
        """Prune the model, rewind it if the recipe says so, and return the report as a dict."""
        recipe = self.recipe.prune
        cut = self._prune_by_rule if recipe.goal is None else self._prune_to_target
        common = {"importance": make_importance(recipe), "ignore": recipe.ignore}
        found = cut(model, iteration, common | structure_arguments(recipe))
        if recipe.rewind != "none":
            start = "init" if recipe.rewind == "init" else "rewind"
            prune.rewind_(model, self.folder.load_tensors(start)[0])
        return found

    def _prune_by_rule(self, model: nn.Module, iteration: int, options: dict) -> dict:
        recipe = self.recipe.prune
        goal: dict = {"alpha": recipe.alpha} if recipe.alpha is not None else {}
        if recipe.sparsity is not None:
            goal = {
                "sparsity": step_sparsity(recipe.sparsity, iteration, recipe.iterations),
                "scope": recipe.scope,
            }
        report = prune.prune_(model, self.pruning_batches(), **options, **goal)
        return json.loads(report.to_json())

    def _prune_to_target(self, model: nn.Module, iteration: int, options: dict) -> dict:
        """Go the iteration's part of the way; the facts hold the target's report, reached or not.

        A target out of reach leaves the masks of the iteration before.
        """
        from liveweight.runs.finish import example_inputs

        recipe = self.recipe.prune
        size = 1 if recipe.target_flops is not None else self.recipe.compress.batch_sizes[0]
        report = prune_to_(
            model,
            self.pruning_batches(),
            example_inputs(self, [size])[size],
            **recipe.targets,
            **options,
            scope=recipe.scope,
            part=iteration / recipe.iterations,
            compile_dense=self.recipe.report.torch_compile,
        )
        self.reporter.say(f"  {report.summary()}")
        facts = json.loads(report.to_json())
        return (facts.pop("pruned") or {"layers": None}) | {"target": facts}


def check_output(model: nn.Module, data: Dataset) -> None:
    """Raise ValueError when the model does not take the data's inputs or has too few outputs."""
    x = data.validation.inputs[:2]
    was_training = model.training
    try:
        with torch.no_grad():
            output = copy.deepcopy(model).eval()(x)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the model does not take inputs of shape {tuple(x.shape)}: {reason}"
        ) from error
    finally:
        model.train(was_training)
    classes = len(data.classes)
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < classes:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the model gives {got} for {len(x)} samples, expected (2, {classes})")
