"""What scoring costs over a plain forward pass of the same samples: paired, interleaved.

    python benchmarks/scoring_cost.py --threads 1 --out benchmarks/results/scoring-cost.md

The floor of NNrelief's scores is one more read of every layer's input and one of its weights; the
rest of the difference to 1.0 is the Gram form of the convolutions and the hooks.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib

import torch
from torch import nn

import liveweight as lw
from liveweight.compress.measure import measure_calls


def lenet5() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


def vgg16() -> nn.Module:
    """VGG-16 with BatchNorm at CIFAR shape, one hidden layer of 512."""
    layers: list[nn.Module] = []
    width = 3
    for repeats, channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(repeats):
            conv = nn.Conv2d(width, channels, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            width = channels
        layers.append(nn.MaxPool2d(2))
    head = [nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers, *head)


def mlp4096() -> nn.Module:
    wide = [part for _ in range(3) for part in (nn.Linear(4096, 4096), nn.ReLU())]
    return nn.Sequential(*wide, nn.Linear(4096, 10))


# name: (net, shape of one batch, batches)
CASES = {
    "LeNet-5": (lenet5, (250, 1, 28, 28), 4),
    "VGG-16 at 32x32": (vgg16, (125, 3, 32, 32), 2),
    "MLP, 4096 wide": (mlp4096, (500, 4096), 2),
}


def cost(name: str, variant: str, budget_s: float) -> tuple[int, float, float, float]:
    """Return samples, median ms of forward and of scoring, and the median of paired ratios."""
    build, shape, count = CASES[name]
    torch.manual_seed(0)
    net = build().eval()
    data = [torch.randn(shape) for _ in range(count)]
    importance = lw.prune.NNRelief(variant=variant)
    calls = {
        "forward": lambda: [net(x) for x in data],
        "score": lambda: lw.score(net, data, importance=importance),
    }
    timings = measure_calls(calls, budget_s=budget_s, min_rounds=7)
    ratio = 1 / timings.speedup("score", "forward")
    ms = [timings.median_us(key) / 1e3 for key in ("forward", "score")]
    return shape[0] * count, *ms, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per candidate")
    parser.add_argument("--out", type=pathlib.Path, help="also write the table as markdown")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = ["| net | variant | samples | forward, ms | scoring, ms | ratio |", "|---" * 6 + "|"]
    for name in CASES:
        for variant in ("authors", "paper"):
            samples, forward, score, ratio = cost(name, variant, args.budget)
            rows.append(
                f"| {name} | {variant} | {samples} | {forward:.1f} | {score:.1f} | {ratio:.2f} |"
            )
            print(rows[-1], flush=True)
    text = "\n".join(
        [
            "# Scoring cost",
            "",
            "NNrelief scores of all layers (`lw.score`) against a plain forward pass over the same",
            "samples; median of paired ratios. Written by `benchmarks/scoring_cost.py`.",
            "",
            *rows,
            "",
            f"{datetime.date.today()}, {args.threads} thread(s)",
            "",
            "```",
            str(lw.info()),
            "```",
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
