"""A pruning run or a study that kills its own process, without warning, in the middle of work.

python killed.py step|write COUNT run RECIPE OUT
python killed.py step|write COUNT study OUT

step   SIGKILL before the COUNT-th step of an optimizer
write  SIGKILL when the COUNT-th file is written but not yet in its place
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import signal
import sys
from dataclasses import dataclass, field

from torch.optim.optimizer import register_optimizer_step_pre_hook

from liveweight import prune
from liveweight.runs.data import load_data
from liveweight.runs.models import build_model
from liveweight.runs.recipe import DataRecipe, TrainRecipe, option
from liveweight.runs.train import evaluate, make_optimizer, order_seed, train_epoch
from liveweight.studies.grid import Study, StudyOptions, run_study


@dataclass(frozen=True)
class Options(StudyOptions):
    """Of the tiny study."""

    data: DataRecipe = field(default_factory=lambda: DataRecipe(limit=60, validation=50))
    epochs: int = option(2, "of the dense net")


def _cells(options: Options) -> list[dict]:
    kinds = ("magnitude", "snip")
    return [{"method": kind, "seed": seed} for seed in options.seeds for kind in kinds]


def _train(model, data, seed: int, phase: int, epochs: int) -> None:
    optimizer = make_optimizer(model, TrainRecipe())
    keeper = prune.keep_masks(model, optimizer) if phase else None
    for epoch in range(epochs):
        train_epoch(model, data.train, optimizer, 20, order_seed(seed, phase, epoch))
    if keeper is not None:
        keeper.remove()


def _run(cell: dict, options: Options, folder) -> dict:
    seed = cell["seed"]
    data = load_data(options.data, seed)

    def dense():
        model = build_model("lenet300", {}, seed)
        _train(model, data, seed, 0, options.epochs)
        return model.state_dict(), {}

    model = build_model("lenet300", {}, seed)
    model.load_state_dict(folder.cached(f"dense-{seed}", dense)[0])
    batch = [(data.train.inputs, data.train.labels)]
    prune.prune_(model, batch, importance=cell["method"], sparsity=0.9)
    _train(model, data, seed, 1, 1)
    return {
        "accuracy": evaluate(model, data.test)[0],
        "mask": _digest(prune.masks(model)),
        "weights": _digest(model.state_dict()),
    }


def _digest(tensors: dict) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


def _page(rows, options, folder) -> str:
    return f"{len(rows)} rows"


TINY = Study("tiny", "A tiny study", Options, _cells, _run, _page)
OPTIONS = Options(seeds=[0, 1])


def _die_at(when: str, count: int) -> None:
    calls = itertools.count(1)

    def die(*_) -> None:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    if when == "step":
        register_optimizer_step_pre_hook(die)
    else:
        os.fsync = die  # the file is written then, and still has another name


def main(when: str, count: str, what: str, *words: str) -> None:
    from liveweight.runs.parse import parse_recipe
    from liveweight.runs.progress import Reporter
    from liveweight.runs.prune_run import execute

    _die_at(when, int(count))
    if what == "run":
        recipe, out = words
        execute(dataclasses.replace(parse_recipe(recipe), out=None), out, Reporter(quiet=True))
    else:
        run_study(TINY, OPTIONS, words[0], reporter=Reporter(quiet=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
