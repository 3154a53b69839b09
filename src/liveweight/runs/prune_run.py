"""The pruning run: train dense, then prune, rewind and retrain, again and again; then finish.

Every phase (0: dense, i: iteration i) keeps its best epoch on the validation set. The test set is
not looked at here: it is opened in finish.py, after the model to keep has been chosen.
"""

from __future__ import annotations

import copy
import math
import pathlib
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from liveweight import prune
from liveweight._check import near_misses
from liveweight.runs.count import count_weights
from liveweight.runs.data import Dataset, load_data
from liveweight.runs.folder import RunFolder
from liveweight.runs.models import build_model
from liveweight.runs.progress import Reporter
from liveweight.runs.recipe import PruneRecipe, Recipe, RecipeError, check_device
from liveweight.runs.train import (
    batches,
    evaluate,
    make_optimizer,
    make_scheduler,
    order_seed,
    train_epoch,
)

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

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    run = PruningRun(recipe, out, reporter or Reporter(), on_epoch)
    for iteration in range(run.folder.iterates_done(), recipe.prune.iterations + 1):
        run.run_phase(iteration)
    finish(run)
    return run.folder


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
        self.recipe, self.reporter, self.on_epoch = recipe, reporter, on_epoch
        self.device = check_device(recipe.device)
        if recipe.prune.iterations:
            make_importance(recipe.prune)
        self.data: Dataset = load_data(recipe.data, recipe.seed).to(self.device)
        self.build()  # names a bad model or bad arguments before the folder is made
        check_output(self.build(), self.data)
        self.folder = RunFolder.open(out, recipe)

    def build(self) -> nn.Module:
        """Return the model with its first weights."""
        model = self.recipe.model
        return build_model(model.name, model.arguments, self.recipe.seed).to(self.device)

    def load(self, iteration: int) -> tuple[nn.Module, dict]:
        """Return the best model of a finished phase, masks attached, and its facts."""
        tensors, facts = self.folder.load_tensors(f"iterates/{iteration:02d}")
        model = self.build()
        set_state_(model, {key: value.to(self.device) for key, value in tensors.items()})
        return model, facts

    def pruning_batches(self) -> list[Tensor]:
        """Return the inputs that are scored: the same training samples in every iteration."""
        order = torch.randperm(
            len(self.data.train), generator=torch.Generator().manual_seed(self.recipe.seed)
        )
        chosen = self.data.train.take(order[: self.recipe.prune.samples].to(self.device))
        return [x for x, _ in batches(chosen, SCORING_BATCH)]

    def run_phase(self, iteration: int) -> None:
        """Train (0) or prune and retrain (1...) and write the best epoch as an iterate."""
        state = self.folder.load_state()
        if state is not None and state["iteration"] != iteration:
            state = None
        title = "train dense" if iteration == 0 else f"prune and retrain {iteration}"
        if iteration:
            title += f"/{self.recipe.prune.iterations}"
        recipe = self.recipe.retrain if iteration else self.recipe.train
        with self.reporter.phase(title, recipe.epochs, state["epoch"] if state else 0):
            phase = _Phase(self, iteration, recipe, state)
            while phase.epoch < recipe.epochs:
                phase.run_epoch()
                self.on_epoch(iteration, phase.epoch)
            phase.close()

    def prune(self, model: nn.Module, iteration: int) -> dict:
        """Prune the model, rewind it if the recipe says so, and return the report as a dict."""
        recipe = self.recipe.prune
        goal: dict = {"alpha": recipe.alpha}
        if recipe.sparsity is not None:
            goal = {
                "sparsity": step_sparsity(recipe.sparsity, iteration, recipe.iterations),
                "scope": recipe.scope,
            }
        if recipe.granularity is not None:
            goal["granularity"] = recipe.granularity
        report = prune.prune_(
            model,
            self.pruning_batches(),
            importance=make_importance(recipe),
            ignore=recipe.ignore,
            **goal,
        )
        if recipe.rewind == "init":
            rewind_(model, self.folder.load_tensors("init")[0])
        return report.to_json()


class _Phase:
    """One phase of training, taken up from its last whole epoch."""

    def __init__(self, run: PruningRun, iteration: int, recipe, state: dict | None) -> None:
        self.run, self.iteration, self.recipe = run, iteration, recipe
        torch.manual_seed(order_seed(run.recipe.seed, iteration, 0))
        if state is None:
            self._start()
        else:
            self.model = run.build()
            set_state_(self.model, state["model"])
        self.optimizer = make_optimizer(self.model, recipe)
        self.scheduler = make_scheduler(self.optimizer, recipe)
        if iteration:
            prune.keep_masks(self.model, self.optimizer)
        if state is None:
            self.epoch, self.best, self.seconds = 0, None, 0.0
            self._save()
        else:
            self._resume(state)

    def _start(self) -> None:
        run = self.run
        if self.iteration == 0:
            self.model, self.facts = run.build(), {"layers": None}
            run.folder.cut_log(0)
            run.folder.save_tensors("init", self.model.state_dict(), {})
        else:
            self.model, before = run.load(self.iteration - 1)
            run.folder.cut_log(before["log_bytes"])
            self.facts = {"pruned": run.prune(self.model, self.iteration)}
            self.facts |= count_weights(self.model)
            run.reporter.say(
                f"  {self.facts['kept']:,} of {self.facts['total']:,} weights are left "
                f"({self.facts['total'] / max(self.facts['kept'], 1):.1f}x fewer)"
            )
            run.folder.log(event="prune", iteration=self.iteration, kept=self.facts["kept"])

    def _resume(self, state: dict) -> None:
        self.epoch, self.best, self.facts = state["epoch"], state["best"], state["facts"]
        self.seconds = state["seconds"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        if self.run.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.run.device)
        self.run.folder.cut_log(state["log_bytes"])
        self.run.reporter.say(f"  resumed after epoch {self.epoch} of {self.recipe.epochs}")

    def run_epoch(self) -> None:
        run, start = self.run, time.perf_counter()
        steps = math.ceil(len(run.data.train) / self.recipe.batch_size)
        lr = self.scheduler.get_last_lr()[0]
        seed = order_seed(run.recipe.seed, self.iteration, self.epoch)
        with run.reporter.epoch(steps) as on_step:
            loss = train_epoch(
                self.model, run.data.train, self.optimizer, self.recipe.batch_size, seed, on_step
            )
        if not math.isfinite(loss):
            raise ValueError(
                f"iteration {self.iteration}, epoch {self.epoch + 1}: the training loss is {loss}; "
                "lower the learning rate"
            )
        self.scheduler.step()
        accuracy, validation_loss = evaluate(self.model, run.data.validation)
        self.epoch += 1
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self._keep_best(accuracy, validation_loss)
        run.folder.log(
            event="epoch",
            iteration=self.iteration,
            epoch=self.epoch,
            lr=lr,
            train_loss=loss,
            validation_loss=validation_loss,
            validation_accuracy=accuracy,
            seconds=round(seconds, 3),
        )
        self._save()
        run.reporter.epoch_done(
            f"epoch {self.epoch}/{self.recipe.epochs}: loss {loss:.4f}, "
            f"validation {100 * accuracy:.2f} %"
        )

    def _keep_best(self, accuracy: float, loss: float) -> None:
        if self.best and (accuracy, -loss) <= (self.best["accuracy"], -self.best["loss"]):
            return
        state = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.best = {"accuracy": accuracy, "loss": loss, "epoch": self.epoch, "model": state}

    def _save(self) -> None:
        state = {
            "iteration": self.iteration,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "best": self.best,
            "facts": self.facts,
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "log_bytes": self.run.folder.log_bytes,
        }
        if self.run.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.run.device)
        self.run.folder.save_state(state)

    def close(self) -> None:
        """Write the best epoch as this phase's iterate."""
        best, folder = self.best, self.run.folder
        set_state_(self.model, best["model"])
        facts = self.facts | count_weights(self.model)
        facts |= {
            "iteration": self.iteration,
            "epoch": best["epoch"],
            "validation_accuracy": best["accuracy"],
            "validation_loss": best["loss"],
            "seconds": round(self.seconds, 2),
            "log_bytes": folder.log_bytes,
        }
        folder.save_tensors(f"iterates/{self.iteration:02d}", best["model"], facts)
        folder.drop_state()


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


def set_state_(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state that may carry masks into a model that may not have them yet."""
    masks = {
        key.removesuffix("_mask"): value
        for key, value in state.items()
        if key.endswith("_mask") and value.dtype == torch.bool
    }
    if masks:
        prune.apply_masks_(model, masks)
    model.load_state_dict(state)


@torch.no_grad()
def rewind_(model: nn.Module, first: dict[str, Tensor]) -> None:
    """Give every parameter and buffer its first value again, and cut it with the masks."""
    state = model.state_dict()
    for key, value in first.items():
        state[key].copy_(value)
    prune.apply_masks_(model, prune.masks(model))
