"""A Pruner inside Lightning's or Hugging Face's Trainer: one call per optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from liveweight.prune.pruner import Pruner

MakePruner = Callable[[nn.Module, torch.optim.Optimizer], Pruner]


def lightning_callback(make_pruner: MakePruner) -> object:
    """Return a Lightning callback that prunes while the Trainer trains.

    make_pruner   (module, optimizer) -> Pruner, called when the fit begins; a Trainer of several
                  optimizers prunes by its first
    Its `pruner` is the Pruner. The pruner's state is saved in Lightning's checkpoints.
    Raises ImportError where neither lightning nor pytorch_lightning is installed.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback

    class PruningCallback(Callback):
        pruner: Pruner | None = None
        _loaded: dict | None = None
        _seen = 0

        def on_fit_start(self, trainer, module) -> None:
            self.pruner = make_pruner(module, trainer.optimizers[0])
            if self._loaded is not None:
                self.pruner.load_state_dict(self._loaded)
            self._seen = trainer.global_step

        def on_train_batch_end(self, trainer, module, *_: object) -> None:
            # Accumulation: several batches make one optimizer step.
            while self._seen < trainer.global_step:
                self._seen += 1
                self.pruner.step()

        def state_dict(self) -> dict:
            return {} if self.pruner is None else self.pruner.state_dict()

        def load_state_dict(self, state: dict) -> None:
            self._loaded = state or None

    return PruningCallback()


def transformers_callback(make_pruner: MakePruner) -> object:
    """Return a Hugging Face Trainer callback that prunes while the Trainer trains.

    make_pruner   (model, optimizer) -> Pruner, called when training begins
    Its `pruner` is the Pruner.
    Raises ImportError where transformers is not installed.
    """
    from transformers import TrainerCallback

    class PruningCallback(TrainerCallback):
        pruner: Pruner | None = None

        def on_train_begin(self, args, state, control, model=None, optimizer=None, **_: object):
            # accelerate wraps the optimizer; hooks belong to the one inside.
            inside = getattr(optimizer, "optimizer", optimizer)
            self.pruner = make_pruner(model, inside)

        def on_step_end(self, args, state, control, **_: object) -> None:
            self.pruner.step()

    return PruningCallback()
