"""Study: hyper and hypo units of a speech net, removed or adapted first, where the net is strange.

A small convolutional net learns spoken digits from four speakers and meets two it never heard,
clean and in noise. The units that are mostly or barely active are removed, or adapted first
without labels, and the errors are compared with those of doing otherwise.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from liveweight.prune import adapt_, find_hyper_hypo, remove_units_
from liveweight.prune.hyper_hypo import HyperHypo
from liveweight.runs.data import Split
from liveweight.runs.models import build_model
from liveweight.runs.recipe import RecipeError, TrainRecipe, option
from liveweight.runs.sound.audio import TEST_TAKES, Recordings, read_recordings
from liveweight.runs.sound.log_mel import LogMel
from liveweight.runs.sound.noise import babble, mix, white
from liveweight.runs.train import (
    EVALUATION_BATCH,
    batches,
    evaluate,
    make_optimizer,
    make_scheduler,
    order_seed,
    train_epoch,
)
from liveweight.studies.grid import Cell, Made, Row, Study, StudyFolder, StudyOptions
from liveweight.studies.hyper_hypo_page import CLEAN, SEEN, SETS, write

NOISES = ("white", "babble")


@dataclass(frozen=True)
class SpeechData:
    """Recordings of spoken digits."""

    path: str | None = option(None, "folder or tar archive of DIGIT_SPEAKER_TAKE.wav")


@dataclass(frozen=True)
class HyperHypoOptions(StudyOptions):
    """What the study of hyper and hypo units takes."""

    data: SpeechData = field(default_factory=SpeechData)
    folds: list[int] = option([0, 1, 2], "pairs of unseen speakers: fold i has 2i and 2i + 1")
    noises: list[str] = option(list(NOISES), f"some of {', '.join(NOISES)}")
    snrs: list[int] = option([20, 10, 5, 0], "signal-to-noise ratios in decibels")
    epochs: int = option(20, "of training; the learning rate falls tenfold after two thirds")
    batch_size: int = option(50, "of training and adaptation")
    lr: float = option(1e-3, "of training (Adam)")
    weight_decay: float = option(1e-4, "of training")
    layers: str = option("linear", "whose units: linear (hidden fully connected ones) or all")
    low: float = option(0.1, "units whose firing rate is at most this are hypo")
    high: float = option(0.9, "units whose firing rate is at least this are hyper")
    percentile: bool = option(True, "low and high are quantiles of each layer's own rates")
    adapt_epochs: list[int] = option([4, 4], "of the chosen units, then of the whole net")
    adapt_lr: float = option(3e-4, "of adaptation (Adam); best for blind adaptation with seed 100")
    margin: float = option(0.5, "between the two best classes, for a label to be used")


def conditions(options: HyperHypoOptions) -> dict[str, tuple[str, int]]:
    """Return name -> (noise or "", signal-to-noise ratio in decibels)."""
    noisy = {f"{kind} {snr} dB": (kind, snr) for kind in options.noises for snr in options.snrs}
    return {SEEN: ("", 0), CLEAN: ("", 0)} | noisy


def cells(options: HyperHypoOptions) -> list[Cell]:
    """Return seed x fold x condition. RecipeError: an option that cannot be."""
    if unknown := sorted(set(options.noises) - set(NOISES)):
        raise RecipeError(f"noises must be some of {', '.join(NOISES)}, got {unknown[0]!r}")
    if options.layers not in ("linear", "all"):
        raise RecipeError(f"layers must be linear or all, got {options.layers!r}")
    if not options.folds or min(options.folds) < 0:
        raise RecipeError(f"folds must be numbers from 0 on, got {options.folds}")
    if len(options.adapt_epochs) != 2 or min(options.adapt_epochs) < 0:
        raise RecipeError(f"adapt_epochs must be two numbers >= 0, got {options.adapt_epochs}")
    return [
        {"seed": seed, "fold": fold, "condition": condition}
        for seed in options.seeds
        for fold in options.folds
        for condition in conditions(options)
    ]


@functools.lru_cache(maxsize=1)
def _recordings(path: str | None) -> Recordings:
    if path is None:
        raise RecipeError("data.path must be given: a folder or archive of DIGIT_SPEAKER_TAKE.wav")
    return read_recordings(path)


@dataclass(frozen=True)
class Fold:
    """Recordings of four speakers to learn from and be tested on, and of two that are unseen."""

    train: Recordings
    seen: Recordings
    unseen: Recordings
    targets: tuple[str, ...]


def make_fold(recordings: Recordings, number: int) -> Fold:
    """Return a fold: speakers 2i and 2i + 1 by name are unseen. RecipeError: no such speakers."""
    speakers = sorted(set(recordings.speakers))
    targets = tuple(speakers[2 * number : 2 * number + 2])
    if len(targets) < 2 or len(speakers) < 3:
        raise RecipeError(f"fold {number} needs two of {len(speakers)} speakers and one to train")
    unseen, test = recordings.spoken_by(*targets), recordings.takes < TEST_TAKES
    parts = (~unseen & ~test, ~unseen & test, unseen)
    return Fold(*map(recordings.take, parts), targets)


def disturb(fold: Fold, noise: str, snr: int, seed: int) -> Recordings:
    """Return the unseen speakers' recordings in noise, which is the same at every ratio.

    Babble is made of the training speakers' voices.
    """
    if not noise:
        return fold.unseen
    generator = torch.Generator().manual_seed(seed)
    make = {"white": white, "babble": functools.partial(babble, fold.train.waves)}[noise]
    waves = tuple(mix(w, make(len(w), generator=generator), snr) for w in fold.unseen.waves)
    return dataclasses.replace(fold.unseen, waves=waves)


def pictures(recordings: Recordings, device: str) -> Split:
    """Return what the net hears: inputs float32 [N, 1, bands, frames], channels last."""
    inputs = LogMel(rate=recordings.rate)(recordings.waves).unsqueeze(1)
    inputs = inputs.to(memory_format=torch.channels_last)
    return Split(inputs, recordings.labels).to(torch.device(device))


def new_net(classes: int, seed: int, device: str) -> nn.Module:
    net = build_model("speech-cnn", {"classes": classes}, seed)
    return net.to(device, memory_format=torch.channels_last)


def train(fold: Fold, options: HyperHypoOptions, seed: int) -> Made:
    """Train a net on the fold's four speakers; return its state and the error it learned to."""
    recipe = TrainRecipe(
        lr=options.lr, weight_decay=options.weight_decay, milestones=[2 * options.epochs // 3]
    )
    split = pictures(fold.train, options.device)
    net = new_net(1 + int(split.labels.max()), seed, options.device)
    optimizer = make_optimizer(net, recipe)
    scheduler = make_scheduler(optimizer, recipe)
    torch.manual_seed(seed)  # of dropout
    for epoch in range(options.epochs):
        train_epoch(net, split, optimizer, options.batch_size, order_seed(seed, 0, epoch))
        scheduler.step()
    return net.state_dict(), {"train_error": error(net, split)}


def error(net: nn.Module, split: Split) -> float:
    return round(1 - evaluate(net, split)[0], 6)


def run(cell: Cell, options: HyperHypoOptions, folder: StudyFolder) -> Row:
    """Compute one cell: errors in [0, 1] of every way to treat the net, and the units found."""
    fold, seed = make_fold(_recordings(options.data.path), cell["fold"]), cell["seed"]
    state, facts = folder.cached(
        f"net-fold-{cell['fold']}-seed-{seed}", lambda: train(fold, options, seed)
    )
    net = new_net(1 + int(fold.train.labels.max()), seed, options.device)
    net.load_state_dict(state)
    found = find(net, fold, options)
    sets = {which: found.units(which) for which in SETS[:3]}
    sets[SETS[3]] = at_random(sets["both"], order_seed(seed, 1, cell["fold"]))
    noise, snr = conditions(options)[cell["condition"]]
    row = facts | {"targets": list(fold.targets), "noise": noise, "snr": snr}
    row["units"] = count_units(found)
    if cell["condition"] == SEEN:
        split = pictures(fold.seen, options.device)
        return row | {"samples": len(split), "errors": removals(net, sets, split)}
    unseen = disturb(fold, noise, snr, order_seed(seed, 2, cell["fold"]))
    odd = unseen.takes % 2 == 1
    heard, split = (pictures(unseen.take(half), options.device) for half in (~odd, odd))
    order = order_seed(seed, 3, cell["fold"])
    adapted, sure = adaptations(net, sets, heard, split, options, order)
    errors = removals(net, sets, split) | adapted
    return row | {"samples": len(split), "errors": errors, "sure": sure}


def find(net: nn.Module, fold: Fold, options: HyperHypoOptions) -> HyperHypo:
    """Find the units by their rates on the recordings that the net learned from."""
    return find_hyper_hypo(
        net,
        [x for x, _ in batches(pictures(fold.train, options.device), EVALUATION_BATCH)],
        low=options.low,
        high=options.high,
        percentile=options.percentile,
        layers=hidden_layers(net) if options.layers == "linear" else None,
    )


def hidden_layers(net: nn.Module) -> list[str]:
    """Return the names of all fully connected layers but the last."""
    return [name for name, m in net.named_modules() if isinstance(m, nn.Linear)][:-1]


def at_random(units: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return as many units of each layer, drawn at random: bool [out] by layer name."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, chosen in units.items():
        rank = torch.randperm(len(chosen), generator=generator).to(chosen.device)
        drawn[name] = rank < chosen.sum()
    return drawn


def removals(net: nn.Module, sets: dict[str, dict[str, Tensor]], split: Split) -> dict[str, float]:
    """Return the error as it is and without each set of units."""
    errors = {"before": error(net, split)}
    for name, units in sets.items():
        cut = copy.deepcopy(net)
        remove_units_(cut, units)
        errors[f"without {name}"] = error(cut, split)
    return errors


def adaptations(
    net: nn.Module,
    sets: dict[str, dict[str, Tensor]],
    heard: Split,
    split: Split,
    options: HyperHypoOptions,
    seed: int,
) -> tuple[dict[str, float], float]:
    """Adapt to `heard` without its labels, in three ways.

    Returns the errors on `split`, and the share of `heard` that the net is sure of at first.
    """
    order = torch.randperm(len(heard), generator=torch.Generator().manual_seed(seed))
    inputs = [x for x, _ in batches(heard, options.batch_size, order.to(heard.labels.device))]
    first = {"blind": None, "selective": sets["both"], "selective, random": sets[SETS[3]]}
    errors, sure = {}, 0.0
    for name, units in first.items():
        changed = copy.deepcopy(net)
        report = adapt_(
            changed,
            inputs,
            units,
            epochs=tuple(options.adapt_epochs),
            margin=options.margin,
            lr=options.adapt_lr,
        )
        errors[name] = error(changed, split)
        if report.rows:
            sure = report.rows[0]["sure"] / report.rows[0]["samples"]
    return errors, sure


def count_units(found: HyperHypo) -> dict[str, list]:
    """Return per layer how many units there are, were found, and are beyond the fixed rates."""
    kinds = {
        "units": lambda unit: torch.ones_like(unit.hypo),
        "hypo": lambda unit: unit.hypo,
        "hyper": lambda unit: unit.hyper,
        "never active": lambda unit: unit.rate == 0,
        "rate <= 0.05": lambda unit: unit.rate <= 0.05,
        "rate >= 0.95": lambda unit: unit.rate >= 0.95,
    }
    counts = {kind: [int(pick(u).sum()) for u in found.values()] for kind, pick in kinds.items()}
    return {"layer": list(found)} | counts


STUDY = Study(
    name="hyper-hypo",
    title="Hyper and hypo units: removal and adaptation on spoken digits",
    options=HyperHypoOptions,
    cells=cells,
    run=run,
    page=write,
)
