"""One phase of a run: dense training, or pruning and retraining; resumable after each epoch."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from liveweight import prune
from liveweight.runs.count import count_weights
from liveweight.runs.pipeline import Augment, autocast_type
from liveweight.runs.recipe import TrainRecipe
from liveweight.runs.train import (
    evaluate,
    make_optimizer,
    make_scheduler,
    order_seed,
    train_epoch,
)

if TYPE_CHECKING:
    from liveweight.runs.prune_run import PruningRun


def make_training(
    run: PruningRun, model: torch.nn.Module, recipe: TrainRecipe
) -> tuple[torch.optim.Optimizer, Callable[..., float]]:
    """Lay the model out as the recipe says; return (optimizer, train(split, seed, on_step))."""
    convolves = any(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    if recipe.channels_last and convolves:
        # Pooling and the gradients of convolutions take half the time this way on CPUs.
        model.to(memory_format=torch.channels_last)
    data, optimizer = run.recipe.data, make_optimizer(model, recipe)
    options = {
        "batch_size": recipe.batch_size,
        "augment": Augment.make(recipe.augment, data.mean, data.std),
        "autocast": autocast_type(recipe.precision, run.device),
    }
    return optimizer, functools.partial(train_epoch, model, optimizer=optimizer, **options)


class Phase:
    """One phase of training, taken up from its last whole epoch."""

    def __init__(
        self, run: PruningRun, iteration: int, recipe: TrainRecipe, state: dict | None
    ) -> None:
        self.run, self.iteration, self.recipe = run, iteration, recipe
        torch.manual_seed(order_seed(run.recipe.seed, iteration, 0))
        if state is None:
            self._start()
        else:
            self.model = run.build()
            prune.load_state_(self.model, state["model"])
        self.optimizer, self.train = make_training(run, self.model, recipe)
        self.autocast = run.autocast(iteration)
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
            loss = self.train(run.data.train, seed=seed, on_step=on_step)
        if not math.isfinite(loss):
            raise ValueError(
                f"iteration {self.iteration}, epoch {self.epoch + 1}: the training loss is {loss}; "
                "lower the learning rate"
            )
        self.scheduler.step()
        accuracy, validation_loss = evaluate(self.model, run.data.validation, self.autocast)
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
        if self.iteration == 0 and self.epoch == run.recipe.prune.rewind:
            run.folder.save_tensors("rewind", self.model.state_dict(), {})
        self._save()
        run.reporter.epoch_done(
            f"{self.epoch}/{self.recipe.epochs}",
            f"loss {loss:.4f}, validation {100 * accuracy:.2f} %",
        )

    def _keep_best(self, accuracy: float, loss: float) -> None:
        if self.best and (accuracy, -loss) <= (self.best["accuracy"], -self.best["loss"]):
            return
        state = {
            key: value.detach().clone(memory_format=torch.contiguous_format)
            for key, value in self.model.state_dict().items()
        }
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
        prune.load_state_(self.model, best["model"])
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
