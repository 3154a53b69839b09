"""A training step under a fixed mask: SparseLinear beside nn.Linear masked after each step.

A step is zero_grad, forward, cross entropy, backward and AdamW (fused) on a batch of random data.
The dense net multiplies its weights by their masks after the optimizer, as users do. The last layer
has ten outputs and stays dense in both. Prints a Markdown table: python benchmarks/training_step.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from shapes import pruned_linear
from torch import nn

import liveweight as lw

# name: widths from input to the last hidden layer
NETS = {"4096-4096-4096-10": (4096, 4096, 4096), "784-1024-10": (784, 1024)}
CLASSES = 10


def dense_net(widths: tuple[int, ...], sparsity: float) -> nn.Sequential:
    """Return an MLP with ReLU whose hidden weights lack their smallest magnitudes."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        linear = nn.Linear(widths[i], widths[i + 1])
        weight = pruned_linear(widths[i + 1], widths[i], sparsity, seed=i)
        linear.weight.data.copy_(weight / (widths[i] * (1 - sparsity)) ** 0.5)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def sparse_net(dense: nn.Sequential) -> nn.Sequential:
    """Return the same net with its hidden layers stored sparse."""
    layers = [
        lw.nn.SparseLinear.from_dense(layer)
        if isinstance(layer, nn.Linear) and layer.out_features != CLASSES
        else copy.deepcopy(layer)
        for layer in dense
    ]
    return nn.Sequential(*layers)


def make_step(net: nn.Sequential, x: torch.Tensor, labels: torch.Tensor, masked: bool) -> Callable:
    """Return a function that does one step and returns the loss."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    hidden = [m.weight for m in net if isinstance(m, nn.Linear) and m.out_features != CLASSES]
    masks = [w.detach() != 0 for w in hidden] if masked else []

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in zip(hidden, masks, strict=False):
                weight.mul_(mask)
        return loss.detach()

    return step


def both_steps(name: str, batch: int, sparsity: float) -> dict[str, Callable]:
    """Return {"dense": step, "sparse": step} of one net on the same data."""
    torch.manual_seed(0)
    dense = dense_net(NETS[name], sparsity)
    x, labels = torch.randn(batch, NETS[name][0]), torch.randint(0, CLASSES, (batch,))
    sparse = make_step(sparse_net(dense), x, labels, masked=False)
    return {"dense": make_step(dense, x, labels, masked=True), "sparse": sparse}


def compare(name: str, batch: int, sparsity: float, rounds: int) -> tuple[float, float, float]:
    """Return median seconds of dense and sparse steps and the median ratio of neighbours.

    Raises RuntimeError where the two nets do not learn the same.
    """
    steps = both_steps(name, batch, sparsity)
    for _ in range(2):
        losses = [float(step()) for step in steps.values()]
    if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[0]):
        raise RuntimeError(f"{name}: the losses are {losses}")
    times: dict[str, list[float]] = {which: [] for which in steps}
    for i in range(rounds):
        for which in list(steps)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            steps[which]()
            times[which].append(time.perf_counter() - start)
    ratios = [d / s for d, s in zip(times["dense"], times["sparse"], strict=True)]
    return *(statistics.median(t) for t in times.values()), statistics.median(ratios)


def table(rounds: int, batch: int = 128, sparsities: tuple[float, ...] = (0.9,)) -> str:
    """Return the comparison as a Markdown table."""
    threads = torch.get_num_threads()
    lines = [
        f"Training step, batch {batch}, {threads} thread(s), torch {torch.__version__}",
        "",
        "| net | sparsity | dense and mask, ms | sparse, ms | ratio |",
        "|---|---|---|---|---|",
    ]
    for name in NETS:
        for sparsity in sparsities:
            dense, sparse, ratio = compare(name, batch, sparsity, rounds)
            times = f"{dense * 1e3:.2f} | {sparse * 1e3:.2f}"
            lines.append(f"| {name} | {sparsity:.0%} | {times} | {ratio:.1f}x |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(table(options.rounds))


if __name__ == "__main__":
    main()
