"""The list of tables: what fills each, how the page lays it out, and what it means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from cpu import bf16_cases, conv_cases, linear_cases, net_cases, other_cases
from cpu.timing import Settings


@dataclasses.dataclass(frozen=True)
class Table:
    """One table: rows(settings) measures it; lines and columns name the labels of its layout.

    form     "ratios": torch / dense / sparse in a cell; or the name of a renderer in page.py
    seconds  per cell, where the suite's figure does not fit
    limit_s  no further cell is started after this, so that the suite ends in time
    """

    name: str
    title: str
    meaning: str
    rows: Callable[[Settings], Iterator[dict]]
    lines: tuple[str, ...] = ()
    columns: str = "sparsity"
    form: str = "ratios"
    threads: int = 1
    seconds: float | None = None
    limit_s: float = 150.0


TABLES = {
    table.name: table
    for table in (
        Table(
            "roofline", "What the machine can do",
            "The ceiling of every other figure: multiply-adds with all operands in registers, and "
            "reads of buffers that fit into each level of memory. A kernel that loads an operand "
            "for every multiply-add cannot pass half of the first on this kind of core.",
            other_cases.roofline, form="roofline",
        ),
        Table(
            "nets", "Whole networks",
            "What a user gets from one call of `compress_` on a randomly pruned net, input to "
            "output; below 1 it would have been better left alone. *Rest*: the compressed net "
            "while its layers hand out stored results: attention, norms, sums and Python, which "
            "no kernel of a layer makes faster. *At most*: x best dense if on top of that the "
            "kept weights ran at the measured peak of multiply-adds, and what joined them cost "
            "nothing; a target above it is out of reach.",
            net_cases.whole_nets, form="nets", seconds=1.0, limit_s=720.0,
        ),
        Table(
            "linear", "Linear layers, single weights removed",
            "The core case, warm caches, one thread: what sparsity buys in one layer.",
            linear_cases.linear, ("shape", "batch"), limit_s=300.0,
        ),
        Table(
            "linear_cold", "Linear layers and blocks with cold caches",
            "The same when other work has emptied the caches before each call, as between the "
            "layers of a large net: the honest figure for batch 1.",
            linear_cases.linear_cold, ("block", "shape", "batch"), seconds=0.8,
        ),
        Table(
            "block", "Linear layers, blocks removed",
            "Blocks let a weight serve several rows or columns at once; warm, 4096x4096. For "
            "small batches quote the cold table instead.",
            linear_cases.blocks, ("block", "batch"),
        ),
        Table(
            "bf16", "Linear layers in bfloat16",
            "Half the bytes, the same sums in fp32. Dense bf16 runs on AMX tiles where the CPU has "
            "them, many times the fp32 rate: beyond a few samples sparsity must be very high.",
            bf16_cases.linear_bf16, ("block", "shape", "batch"),
        ),
        Table(
            "nm", "2:4",
            "Two of four weights removed along the input: no faster than 50 % removed anywhere, "
            "which is why a CPU runs it as unstructured.",
            linear_cases.nm, ("shape", "batch"), form="list",
        ),
        Table(
            "conv_kernelwise", "3x3 convolutions, whole kernels removed",
            "Direct convolution without an unfolded copy of the input; warm, one thread.",
            conv_cases.conv_kernelwise, ("layer", "batch"),
        ),
        Table(
            "conv_unstructured", "3x3 convolutions, single weights removed",
            "The same layers without structure: each load serves fewer multiply-adds.",
            conv_cases.conv_unstructured, ("layer", "batch"),
        ),
        Table(
            "pointwise", "1x1 convolutions",
            "A kernel is one weight here, so both granularities are the same.",
            conv_cases.pointwise, ("layer", "batch"),
        ),
        Table(
            "dlmc", "Real masks: Deep Learning Matrix Collection, batch 64",
            "Masks of a Transformer and a ResNet-50 pruned by magnitude, random values: real rows "
            "are less even than random ones.",
            other_cases.dlmc, ("model", "matrix"),
        ),
        Table(
            "crossover", "Linear layers at low sparsity",
            "Where sparse starts to pay: below 1 the dense layer is the better choice, and "
            "`compress_` keeps it.",
            linear_cases.crossover, ("shape", "batch"),
        ),
        Table(
            "crossover_conv", "3x3 convolutions at low sparsity",
            "The same for convolutions, whole kernels removed.",
            conv_cases.crossover_conv, ("layer", "batch"),
        ),
        Table(
            "two_threads", "Linear layers on two threads",
            "Both sides use two threads of PyTorch's pool.",
            linear_cases.two_threads, ("shape", "batch"), threads=2,
        ),
        Table(
            "conv_two_threads", "3x3 convolutions on two threads",
            "Both sides use two threads of PyTorch's pool.",
            conv_cases.conv_two_threads, ("layer", "batch"), threads=2,
        ),
        Table(
            "training", "Training under a fixed mask",
            "Forward, backward and update of a pruned net, the gradients at sparse cost.",
            other_cases.training, form="list", seconds=2.0,
        ),
        Table(
            "memory", "Memory",
            "Bytes per weight of the dense layer (fp32: 4), beside 6 bytes per kept weight + 5 %.",
            other_cases.memory, form="memory",
        ),
        Table(
            "removal", "Whole units removed",
            "Removing neurons needs no sparse kernel: the layer that `shrink_` leaves is a smaller "
            "dense one. Shrink first, then sparsify the rest.",
            other_cases.removal, ("net", "batch"), "removed",
        ),
        Table(
            "activity", "Statistics for scores",
            "One pass over the activations in place of two and a temporary.",
            other_cases.activity, ("x",), form="list",
        ),
    )
}  # fmt: skip


def chosen(only: str | None) -> list[Table]:
    """Return the tables whose names start with one of the words in `only`; ValueError if none."""
    words = [word for word in (only or "").split(",") if word]
    found = [t for t in TABLES.values() if not words or any(t.name.startswith(w) for w in words)]
    unknown = [w for w in words if not any(name.startswith(w) for name in TABLES)]
    if unknown:
        raise ValueError(f"--only: no table starts with {unknown}; there are {list(TABLES)}")
    return found
