"""Tables besides single sparse layers: roofline, DLMC, memory, training, removed units, scores."""

from __future__ import annotations

import importlib
import os
import pathlib
import tarfile
from collections.abc import Iterator

import numpy
import torch
import torch.nn.functional as F
from shapes import pruned_linear
from torch import Tensor

import liveweight as lw
from cpu import linear_cases
from cpu.conv_cases import LAYERS, pruned
from cpu.timing import OURS, Cell, Settings, measure

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARCHIVE = "dlmc-subset.tar.xz"


class Absent(RuntimeError):
    """Something optional is not here; the table is left out with this reason."""


def roofline(settings: Settings) -> Iterator[dict]:
    """What the machine can do: multiply-adds in registers, and reads from each memory level."""
    seconds = 0.1 if settings.quick else 0.4
    levels = {"L1": 24 << 10, "L2": 1 << 20, "L3": 32 << 20, "DRAM": 768 << 20}
    for threads in sorted(settings.peaks):
        torch.set_num_threads(threads)
        row: dict = {"threads": threads, "gflops": torch.ops.liveweight.cpu_peak(threads, seconds)}
        for level, size in levels.items():
            size = size // threads if level == "DRAM" else size
            row[level] = torch.ops.liveweight.cpu_stream(size, threads, seconds)
        yield row


def data_folder() -> pathlib.Path:
    """Return where shared data lie: LIVEWEIGHT_DATA, else ../shared/data beside the project."""
    return pathlib.Path(os.environ.get("LIVEWEIGHT_DATA") or ROOT.parent / "shared" / "data")


def read_smtx(text: str, seed: int = 0) -> Tensor:
    """Return the pattern of a .smtx file (sizes, row offsets, columns) with Gaussian values."""
    head, offsets, columns = text.strip("\n").split("\n")[:3]
    rows, width, kept = (int(v) for v in head.split(","))
    offset = numpy.array(offsets.split(), dtype=numpy.int64)
    column = numpy.array(columns.split(), dtype=numpy.int64)
    if len(offset) != rows + 1 or len(column) != kept or offset[-1] != kept:
        raise ValueError(f"smtx: {rows} rows and {kept} entries announced, found {len(column)}")
    weight = numpy.zeros((rows, width), dtype=numpy.float32)
    row = numpy.repeat(numpy.arange(rows), numpy.diff(offset))
    weight[row, column] = numpy.random.default_rng(seed).standard_normal(kept)
    return torch.from_numpy(weight)


def dlmc(settings: Settings) -> Iterator[dict]:
    """Pruned Transformer and ResNet-50 matrices of the collection, random values, batch 64."""
    archive = data_folder() / ARCHIVE
    if not archive.exists():
        raise Absent(f"{ARCHIVE} is not in {data_folder().name}/: set LIVEWEIGHT_DATA or --data")
    wanted = settings.pick(("0.5", "0.7", "0.8", "0.9", "0.95", "0.98"), ("0.9",))
    with tarfile.open(archive) as files:
        for member in files:
            if not member.name.endswith(".smtx"):
                continue
            _, model, _, sparsity, name = member.name.split("/")
            if sparsity not in wanted:
                continue
            weight = read_smtx(files.extractfile(member).read().decode())
            labels = {"matrix": name.removesuffix(".smtx"), "model": model}
            labels["sparsity"] = float(sparsity)
            problem = linear_cases.Problem(weight, labels)
            cell = problem.cell(64, linear_cases.unstructured(weight))
            yield measure(cell, settings)


def memory(settings: Settings) -> Iterator[dict]:
    """Bytes that a packed weight takes, per weight of the dense one."""
    for shape in settings.pick(((4096, 4096), (1024, 1024), (300, 784)), ((1024, 1024),)):
        for sparsity in (0.5, 0.7, 0.9, 0.95, 0.98):
            packed = lw.formats.Unstructured.from_dense(pruned_linear(*shape, sparsity))
            yield _bytes("unstructured", "x".join(map(str, shape)), packed)
    for sparsity in (0.5, 0.9):
        weight = linear_cases.pruned_blocks((1024, 1024), (16, 16), sparsity)
        packed = lw.formats.Block.from_dense(weight, block=(16, 16))
        yield _bytes("block 16x16", "1024x1024", packed)
        for whole, form in ((True, "Kernelwise"), (False, "UnstructuredKernels")):
            weight = pruned(LAYERS["256@8x8"], sparsity, whole)
            packed = getattr(lw.formats, form).from_dense(weight)
            yield _bytes("kernelwise" if whole else "unstructured conv", "256@8x8", packed)


def _bytes(name: str, shape: str, packed) -> dict:
    density = packed.density
    count = torch.Size(packed.shape).numel()
    per_weight = packed.nbytes / count
    limit = 6 * density * 1.05
    return {
        "format": name, "shape": shape, "density": density, "bytes": per_weight, "limit": limit,
        "share": per_weight / limit, "smaller": 4 / per_weight,
    }  # fmt: skip


def training(settings: Settings) -> Iterator[dict]:
    """A step of AdamW under a fixed mask, as benchmarks/training_step.py measures it."""
    try:
        module = importlib.import_module("training_step")
    except ImportError as error:
        raise Absent(f"benchmarks/training_step.py cannot be imported: {error}") from error
    wide, narrow = "4096-4096-4096-10", "784-1024-10"
    for net in settings.pick((wide, narrow), (narrow,)):
        for sparsity in settings.pick((0.9, 0.95), (0.9,)):
            dense, sparse, ratio = module.compare(net, 128, sparsity, 7 if settings.quick else 11)
            yield {
                "net": net, "batch": 128, "sparsity": sparsity, "threads": 1,
                "us": {OURS: 1e6 * sparse, "dense and mask": 1e6 * dense},
                "ratios": {"dense and mask": ratio}, "torch": ratio,
            }  # fmt: skip


def removal(settings: Settings) -> Iterator[dict]:
    """Whole units removed: the smaller dense layer that shrink_ leaves, beside the original."""
    widths = {"MLP 1024-4096-1024": (1024, 4096), "MLP 784-300-100": (784, 300)}
    for name, (inp, hidden) in widths.items():
        for removed in settings.pick((0.5, 0.75, 0.9), (0.75,)):
            for batch in settings.pick((1, 32, 128), (32,)):
                yield measure(_removed(name, inp, hidden, removed, batch), settings)


def _removed(name: str, inp: int, hidden: int, removed: float, batch: int) -> Cell:
    out = 1024 if inp == 1024 else 100
    x = torch.randn(batch, inp)
    first, second = torch.randn(hidden, inp), torch.randn(out, hidden)
    kept = round(hidden * (1 - removed))
    first[kept:], second[:, kept:] = 0, 0
    small = (first[:kept].contiguous(), second[:, :kept].contiguous())

    def run(a: Tensor, b: Tensor):
        return lambda: F.linear(F.relu(F.linear(x, a)), b)

    def truth() -> Tensor:
        return F.linear(F.relu(F.linear(x.double(), first.double())), second.double())

    calls = {OURS: run(*small), "F.linear": run(first, second)}
    labels = {"net": name, "removed": removed, "batch": batch}
    return Cell(labels, calls, {"F.linear": "torch"}, truth=truth)


def activity(settings: Settings) -> Iterator[dict]:
    """The statistics that scores need, in one pass, beside x.abs().mean(0)."""
    shapes = ((1, 784), (32, 784), (128, 1024), (512, 4096), (60000, 784))
    for shape in settings.pick(shapes, ((128, 1024),)):
        x = torch.randn(shape)
        stats = lw.ops.new_activity_stats(shape[1])

        def ours(x=x, stats=stats):
            lw.ops.activity_stats_(stats, x)

        calls = {OURS: ours, "x.abs().mean(0)": lambda x=x: x.abs().mean(0)}
        labels = {"x": "x".join(map(str, shape))}
        yield measure(Cell(labels, calls, {"x.abs().mean(0)": "torch"}), settings)
