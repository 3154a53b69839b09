"""The README's table: sparse layers over dense ones, paired, interleaved, one line per layer.

    python benchmarks/linear_and_conv.py --threads 2 --out benchmarks/results/linear-and-conv.md

Each cell is the speed-up over the stronger of the plain PyTorch call and oneDNN with a pre-packed
weight (Linear), or of NCHW and channels_last (Conv2d): median of the per-round ratios.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib

import torch
import torch.nn.functional as F
from shapes import CONV, LINEAR, pruned_conv, pruned_linear

import liveweight as lw
from liveweight.compress.measure import Timings, measure_calls

SPARSITIES = (0.5, 0.7, 0.9, 0.95)
BATCHES = (1, 8, 64)


def linear_calls(shape: tuple[int, int], batch: int, sparsity: float) -> dict:
    rows, columns = shape
    weight, x = pruned_linear(rows, columns, sparsity), torch.randn(batch, columns)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
    sparse = lw.formats.Unstructured.from_dense(weight)
    return {
        "dense": lambda: F.linear(x, weight),
        "dense, pre-packed": lambda: torch.ops.mkldnn._linear_pointwise(
            x, packed, None, "none", [], ""
        ),
        "liveweight": lambda: lw.ops.unstructured_linear(x, sparse),
    }


def conv_calls(shape: tuple, batch: int, sparsity: float) -> dict:
    inp, out, kernel, side, stride, padding = shape
    weight, x = pruned_conv(out, inp, kernel, sparsity), torch.randn(batch, inp, side, side)
    last, x_last = (t.contiguous(memory_format=torch.channels_last) for t in (weight, x))
    sparse = lw.formats.Kernelwise.from_dense(weight)
    return {
        "dense": lambda: F.conv2d(x, weight, None, stride, padding),
        "dense, channels_last": lambda: F.conv2d(x_last, last, None, stride, padding),
        "liveweight": lambda: lw.ops.kernelwise_conv2d(x, sparse, stride=stride, padding=padding),
    }


def fused_calls(shape: tuple, batch: int, sparsity: float) -> dict:
    inp, out, kernel, side, stride, padding = shape
    weight, x = pruned_conv(out, inp, kernel, sparsity), torch.randn(batch, inp, side, side)
    last, x_last = (t.contiguous(memory_format=torch.channels_last) for t in (weight, x))
    sparse = lw.formats.Kernelwise.from_dense(weight)

    def chain(x, weight):
        return lambda: F.max_pool2d(F.relu(F.conv2d(x, weight, None, stride, padding)), 2)

    return {
        "dense": chain(x, weight),
        "dense, channels_last": chain(x_last, last),
        "liveweight": lambda: lw.ops.kernelwise_conv2d(
            x, sparse, stride=stride, padding=padding, activation="relu", pool=2
        ),
    }


def speedup(timings: Timings) -> float:
    """Return the speed-up over whichever dense call is the fastest."""
    return min(timings.speedup("liveweight", n) for n in timings.samples if n != "liveweight")


def table(title: str, layers: dict, calls, batches: tuple, budget_s: float) -> list[str]:
    head = " | ".join(f"{100 * s:.0f} %" for s in SPARSITIES)
    rows = [f"| {title} | batch | {head} |", "|---|--:|" + "--:|" * len(SPARSITIES)]
    for name, shape in layers.items():
        for batch in batches:
            cells = [
                speedup(measure_calls(calls(shape, batch, s), budget_s=budget_s))
                for s in SPARSITIES
            ]
            rows.append(f"| {name} | {batch} | " + " | ".join(f"{c:.2f}" for c in cells) + " |")
            print(rows[-1], flush=True)
    return rows


def describe(name: str, kind: str) -> str:
    if kind == "linear":
        return f"{name} {LINEAR[name][0]}x{LINEAR[name][1]}"
    inp, out, kernel, side, stride, _ = CONV[name]
    return f"{name} {inp}->{out}, {kernel}x{kernel} on {side}x{side}, stride {stride}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per candidate")
    parser.add_argument("--out", type=pathlib.Path, help="also write the tables as markdown")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    linear = {describe(n, "linear"): shape for n, shape in LINEAR.items()}
    conv = {describe(n, "conv"): shape for n, shape in CONV.items()}
    parts = [
        table("`unstructured_linear`, weights removed", linear, linear_calls, BATCHES, args.budget),
        table("`kernelwise_conv2d`, kernels removed", conv, conv_calls, (1, 64), args.budget),
        table("conv + ReLU + 2x2 max pool, fused", conv, fused_calls, (1, 64), args.budget),
    ]
    text = "\n\n".join(
        [
            "# Linear and convolution layers over dense",
            "Speed-up of one layer over the fastest dense call (plain or pre-packed oneDNN\n"
            "for Linear; NCHW or channels_last for Conv2d), fp32, warm caches, random masks;\n"
            "median of paired ratios. Below 1.00 sparse is slower. `benchmarks/linear_and_conv.py`",
            *("\n".join(rows) for rows in parts),
            f"{datetime.date.today()}, {args.threads} threads",
            f"```\n{lw.info()}\n```\n",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
