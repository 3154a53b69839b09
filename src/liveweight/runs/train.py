"""Training and evaluation of a model on tensors that are already in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from liveweight.runs.data import Split
from liveweight.runs.pipeline import Augment
from liveweight.runs.recipe import TrainRecipe

EVALUATION_BATCH = 500


def make_optimizer(model: nn.Module, recipe: TrainRecipe) -> torch.optim.Optimizer:
    """Return a fresh optimizer over all parameters of the model."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    common = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=recipe.momentum, **common)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(parameters, **common)


def make_scheduler(
    optimizer: torch.optim.Optimizer, recipe: TrainRecipe
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule: lr times gamma at each milestone epoch."""
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, recipe.milestones, recipe.gamma)


def order_seed(seed: int, iteration: int, epoch: int) -> int:
    """Return the seed of one epoch's order: known from its place alone, so a resume repeats it."""
    return (seed * 1_000_003 + iteration * 10_007 + epoch) % 2**63


def batches(
    split: Split, size: int, order: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, labels) of size samples, in the given order or as stored."""
    for start in range(0, len(split), size):
        if order is None:
            yield split.inputs[start : start + size], split.labels[start : start + size]
        else:
            index = order[start : start + size]
            yield split.inputs[index], split.labels[index]


def train_epoch(
    model: nn.Module,
    split: Split,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
    *,
    augment: Augment | None = None,
    autocast: torch.dtype | None = None,
) -> float:
    """Train one epoch with cross entropy in a seeded order; return the mean loss per sample.

    augment    drawn from the same seed as the order; None: inputs as they are
    autocast   what torch.autocast computes in, such as torch.bfloat16; None: float32
    """
    model.train()
    device = split.labels.device
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split), generator=generator).to(device)
    moves = augment.draw(len(split), generator, device) if augment is not None else None
    total, done = torch.zeros((), device=device), 0
    for x, y in batches(split, batch_size, order):
        if moves is not None:
            x = augment.apply(x, moves.part(done, done + len(y)))
        optimizer.zero_grad(set_to_none=True)
        with casting(device, autocast):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(y)
        done += len(y)
        on_step()
    return float(total) / len(split)


def casting(device: torch.device, autocast: torch.dtype | None) -> torch.autocast:
    """Return the context that computes in that type; without one it changes nothing."""
    return torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None)


@torch.inference_mode()
def evaluate(
    model: nn.Module, split: Split, autocast: torch.dtype | None = None
) -> tuple[float, float]:
    """Return (accuracy in [0, 1], mean cross entropy) in evaluation mode.

    autocast   what torch.autocast computes in, such as torch.bfloat16; None: float32
    """
    model.eval()
    device = split.labels.device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    total = torch.zeros((), device=device)
    for x, y in batches(split, EVALUATION_BATCH):
        with casting(device, autocast):
            output = model(x).float()
        correct += (output.argmax(1) == y).sum()
        total += nn.functional.cross_entropy(output, y, reduction="sum")
    return int(correct) / len(split), float(total) / len(split)
