"""What structure costs in accuracy: the same scores cut as single weights, blocks and panels.

    python benchmarks/structure.py --mnist FOLDER --cifar FOLDER    half an hour on one core
    python benchmarks/structure.py --quick --out FOLDER             packaged digits: a minute
    python benchmarks/structure.py --page-only                      page and plot from the results

MNIST as its four IDX files; CIFAR-10 as train/CLASS/*.jpg and test/CLASS/*.jpg. One net is trained
per seed; every mask is cut from a copy of it, evaluated, fine-tuned for a short while and evaluated
again, on the test set and without choosing anything by it. Results are written after every seed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import json
import pathlib
import time
from collections.abc import Iterator

import structure_page
import torch
from torch import nn

import liveweight as lw
from liveweight.runs.data import Dataset, load_data
from liveweight.runs.models import LeNet5, initialize_
from liveweight.runs.prune_run import denormals_flushed
from liveweight.runs.recipe import DataRecipe, TrainRecipe
from liveweight.runs.train import evaluate, make_optimizer, make_scheduler, train_epoch

OUT = pathlib.Path(__file__).with_name("results") / "structure"
PANEL = 16  # rows of a V:N:M panel
GROUPS = {0.5: 4, 0.75: 8, 0.9: 20, 0.95: 40}  # M by sparsity: 2 / M are kept
SMALL = (10, 5)  # for LeNet-5's second convolution, 50 x 20: 20 blocks
LENET_BLOCKS = tuple(
    (f"blocks {h}x{w}", {"conv": SMALL, "linear": (h, w)}) for h, w in ((16, 16), (32, 32), (64, 1))
)
VGG_BLOCKS = tuple((f"blocks {n}x{n}", {"conv": (n, n), "linear": (n, n)}) for n in (16, 32))


class SingleWeights(lw.prune.NNRelief):
    """NNrelief's score of every weight by itself, in convolutions too; no unit is cleaned up."""

    name = "nnrelief"

    def __init__(self) -> None:
        super().__init__(cleanup=False)

    def default_granularity(self, kind: str) -> str:
        return "weight"


IMPORTANCES = {"magnitude": lw.prune.Magnitude, "nnrelief": SingleWeights}


def vgg(channels: int = 3, classes: int = 10) -> nn.Module:
    """A narrow VGG for 32x32 pictures; widths that 40 divides, so that every pattern fits."""
    layers: list[nn.Module] = []
    width = channels
    for out, pool in ((80, True), (80, True), (160, False), (160, True)):
        conv = nn.Conv2d(width, out, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(out), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
        width = out
    layers += [nn.Flatten(), nn.Linear(width * 16, 320), nn.ReLU(), nn.Linear(320, classes)]
    return initialize_(nn.Sequential(*layers))


@dataclasses.dataclass(frozen=True)
class Case:
    """A net, its data and how long it learns. tune_samples: of one epoch of fine-tuning."""

    name: str
    net: str
    data: DataRecipe
    epochs: int
    tune_samples: int
    ignore: tuple[str, ...]
    importances: tuple[str, ...]
    blocks: tuple[tuple[str, dict], ...]
    seeds: tuple[int, ...]
    batch_size: int = 100
    lr: float = 1e-3
    tune_lr: float = 3e-4
    bf16: bool = False

    def build(self) -> nn.Module:
        net = {"lenet5": LeNet5, "vgg": vgg}[self.net]()
        return net.to(memory_format=torch.channels_last)


def cases(args: argparse.Namespace) -> list[Case]:
    """Return the cases that the arguments ask for."""
    ends = ("features.0", "classifier.3")
    both = ("magnitude", "nnrelief")
    if args.quick:
        digits = DataRecipe(limit=1000)
        return [Case("LeNet-5, digits", "lenet5", digits, 3, 500, ends, both, LENET_BLOCKS, (0,))]
    found = []
    if args.mnist:
        data = DataRecipe(source="idx", path=args.mnist, validation=5000)
        seeds = tuple(range(args.mnist_seeds))
        found.append(
            Case("LeNet-5, MNIST", "lenet5", data, 3, 10000, ends, both, LENET_BLOCKS, seeds)
        )
    if args.cifar:
        data = DataRecipe(
            source="images", path=args.cifar, channels=3, limit=20000,
            mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        )  # fmt: skip
        seeds = tuple(range(args.cifar_seeds))
        ends = ("0", "18")
        found.append(
            Case(
                "VGG-like, CIFAR-10", "vgg", data, 8, 10000, ends, ("magnitude",), VGG_BLOCKS,
                seeds, bf16=True,
            )
        )  # fmt: skip
    return found


def masks(case: Case) -> Iterator[tuple[str, bool, float, dict]]:
    """Yield structure, clustered or not, sparsity, and the arguments of prune_."""
    for sparsity, group in GROUPS.items():
        yield "single weights", False, sparsity, {"granularity": "weight", "sparsity": sparsity}
        for name, block in case.blocks:
            how = {"granularity": "block", "block": block, "sparsity": sparsity}
            for clustered in (False, True):
                yield name, clustered, sparsity, how
        how = {"granularity": "vnm", "pattern": (PANEL, 2, group)}
        yield f"V:N:M, V = {PANEL}", False, sparsity, how


@contextlib.contextmanager
def learning(case: Case) -> Iterator[None]:
    # Without the cache: inside one context it would go on using the weights of the first step.
    with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16, cache_enabled=False):
        yield


def train(case: Case, data: Dataset, seed: int) -> nn.Module:
    """Return a net trained from this seed."""
    torch.manual_seed(seed)
    model = case.build()
    recipe = TrainRecipe(
        epochs=case.epochs, batch_size=case.batch_size, lr=case.lr,
        milestones=[max(1, 2 * case.epochs // 3)],
    )  # fmt: skip
    optimizer = make_optimizer(model, recipe)
    schedule = make_scheduler(optimizer, recipe)
    for epoch in range(case.epochs):
        with learning(case):
            train_epoch(model, data.train, optimizer, case.batch_size, 1000 * seed + epoch)
        schedule.step()
    return model.eval()


def share(scores: torch.Tensor, model: nn.Module, name: str) -> float:
    """Return the share of a layer's scores that its mask keeps."""
    mask = lw.masks(model)[f"{name}.weight"]
    return float(scores[mask].sum(dtype=torch.float64) / scores.sum(dtype=torch.float64))


def measure(
    case: Case, data: Dataset, dense: nn.Module, seed: int, importance: str, mask: tuple
) -> dict | None:
    """Cut one mask, evaluate, train on, evaluate; None where a layer cannot have the pattern."""
    structure, clustered, sparsity, how = mask
    model = copy.deepcopy(dense)
    scored = data.train.inputs[:1000]
    chosen = {"importance": IMPORTANCES[importance](), "ignore": case.ignore}
    if clustered:
        lw.prune.cluster_(model, [scored], block=how["block"], sparsity=sparsity, **chosen)
    scores = lw.score(model, [scored], granularity="weight", **chosen)
    report = lw.prune_(model, [scored], **chosen, **how)
    rows = [r for r in report.layers if r.name not in case.ignore]
    if any(r.note.startswith("left alone") for r in rows):
        return None
    if how["granularity"] == "weight":
        for row in rows:  # the largest scores: the best there is
            row.kept_mass = row.best_mass = share(scores[row.name], model, row.name)
    lw.recalibrate_bn_(model, [scored])
    before = evaluate(model, data.test)[0]
    optimizer = make_optimizer(model, TrainRecipe(lr=case.tune_lr))
    lw.keep_masks(model, optimizer)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    subset = data.train.take(order[: case.tune_samples])
    with learning(case):
        train_epoch(model, subset, optimizer, case.batch_size, 777 + seed)
    after = evaluate(model, data.test)[0]
    kept, total = sum(r.kept for r in rows), sum(r.total for r in rows)
    return {
        "case": case.name,
        "importance": importance,
        "seed": seed,
        "structure": structure,
        "clustered": clustered,
        "sparsity": sparsity,
        "density": kept / total,
        "mass": sum(r.kept_mass for r in rows) / len(rows),
        "best_mass": sum(r.best_mass for r in rows) / len(rows),
        "before": before,
        "after": after,
    }


def run_seed(case: Case, data: Dataset, seed: int) -> list[dict]:
    """Return one row for the dense net, fine-tuned like the pruned ones, and one per mask."""
    dense = train(case, data, seed)
    everything = ("single weights", False, 0.0, {"granularity": "weight", "sparsity": 0.0})
    rows = [measure(case, data, dense, seed, "magnitude", everything) | {"structure": "dense"}]
    print(f"{case.name}, seed {seed}: dense {rows[0]['before']:.4f}", flush=True)
    for importance in case.importances:
        for mask in masks(case):
            row = measure(case, data, dense, seed, importance, mask)
            if row is not None:
                rows.append(row)
                print("  " + structure_page.line(row), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", help="folder of MNIST's four IDX files")
    parser.add_argument("--cifar", help="folder with train/CLASS and test/CLASS of CIFAR-10")
    parser.add_argument("--mnist-seeds", type=int, default=3)
    parser.add_argument("--cifar-seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="1,000 of the packaged digits")
    parser.add_argument("--page-only", action="store_true", help="write the page from the results")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args(arguments)
    if not (args.page_only or args.quick or args.mnist or args.cifar):
        parser.error("give --mnist, --cifar, --quick or --page-only")
    torch.set_num_threads(args.threads)
    if not args.page_only:
        args.out.mkdir(parents=True, exist_ok=True)
        with denormals_flushed():
            run_all(cases(args), args)
    structure_page.write(args.out)


def run_all(wanted: list[Case], args: argparse.Namespace) -> None:
    for case in wanted:
        started, rows = time.perf_counter(), []
        data = load_data(case.data)
        for seed in case.seeds:
            rows += run_seed(case, data, seed)
            settings = dataclasses.asdict(case) | {"train": len(data.train), "test": len(data.test)}
            settings["data"].pop("path")
            facts = {
                "case": case.name,
                "settings": settings,
                "seconds": round(time.perf_counter() - started),
                "threads": args.threads,
                "date": str(datetime.date.today()),
                "machine": str(lw.info()).partition("\n\n")[0],
                "rows": rows,
            }
            name = case.name.lower().replace(", ", "-")
            (args.out / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
