"""Tables of Linear layers: unstructured, blocks, 2:4; warm, cold and on two threads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from shapes import pruned_linear
from torch import Tensor

import liveweight as lw
from cpu import baselines
from cpu.timing import OURS, Cell, Settings, measure

SQUARE, WIDE, TALL, LENET = (4096, 4096), (4096, 1024), (1024, 1024), (300, 784)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


class Problem:
    """One weight in every form its calls need; made once for all batches."""

    def __init__(self, weight: Tensor, labels: dict, sparse: bool = True) -> None:
        self.weight, self.labels = weight, labels
        self.exact = weight.double()
        self.kept = int((weight != 0).sum())
        self.csr, self.scipy = baselines.to_csr(weight) if sparse else (None, None)

    def cell(self, batch: int, ours, extra: dict | None = None, compiled: bool = False) -> Cell:
        """Return a cell; ours is called with x, and `extra` makes further calls from x."""
        x = torch.randn(batch, self.weight.shape[1])
        calls = {OURS: lambda: ours(x), **baselines.dense_linear(x, self.weight)}
        if compiled:
            calls |= baselines.compiled(x, self.weight)
        if self.csr is not None:
            calls |= baselines.sparse_linear(x, self.weight, self.csr, self.scipy)
        for make in (extra or {}).values():
            calls |= make(x)
        labels = {"shape": "x".join(map(str, self.weight.shape)), "batch": batch, **self.labels}
        return Cell(
            labels, calls, baselines.LINEAR_KINDS, 2.0 * self.kept * batch,
            truth=lambda: x.double() @ self.exact.t(),
        )  # fmt: skip


def unstructured(weight: Tensor):
    packed = lw.formats.Unstructured.from_dense(weight)
    return lambda x: lw.ops.unstructured_linear(x, packed)


def block(weight: Tensor, size: tuple[int, int]):
    packed = lw.formats.Block.from_dense(weight, block=size)
    return lambda x: lw.ops.block_linear(x, packed)


def pruned_blocks(shape: tuple[int, int], size: tuple[int, int], sparsity: float) -> Tensor:
    """Return a Gaussian weight in which random blocks are zero."""
    generator = torch.Generator().manual_seed(0)
    grid = (shape[0] // size[0], shape[1] // size[1])
    score = torch.rand(grid, generator=generator)
    kept = torch.zeros(score.numel())
    kept[score.flatten().argsort()[round(sparsity * score.numel()) :]] = 1
    mask = kept.view(grid).repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
    return torch.randn(shape, generator=generator) * mask


def linear(settings: Settings) -> Iterator[dict]:
    """Unstructured weights, warm: shapes x sparsities x batches."""
    shapes = settings.pick((SQUARE, WIDE, TALL, LENET), (SQUARE, TALL))
    batches = settings.pick((1, 8, 32, 128, 512), (1, 32))
    for shape in shapes:
        for sparsity in settings.pick(SPARSITIES, (0.5, 0.9)):
            problem = Problem(pruned_linear(*shape, sparsity), {"sparsity": sparsity})
            ours = unstructured(problem.weight)
            for batch in batches:
                compiled = (shape, sparsity, batch) in ((SQUARE, 0.9, 32), (TALL, 0.9, 1))
                cell = problem.cell(batch, ours, compiled=compiled and not settings.quick)
                yield measure(cell, settings)


def linear_cold(settings: Settings) -> Iterator[dict]:
    """Unstructured weights and blocks, each call after 128 MB of other memory."""
    sparsities = settings.pick((0.5, 0.8, 0.9, 0.95), (0.9,))
    batches = settings.pick((1, 8, 32), (32,))
    for shape in settings.pick((SQUARE, TALL), (SQUARE,)):
        for sparsity in sparsities:
            problem = Problem(
                pruned_linear(*shape, sparsity), {"sparsity": sparsity, "block": "single weights"}
            )
            for batch in batches:
                cell = problem.cell(batch, unstructured(problem.weight))
                yield measure(cell, settings, cold=True)
    for size in settings.pick(((16, 1), (16, 16)), ((16, 16),)):
        for sparsity in settings.pick((0.5, 0.9, 0.95), (0.9,)):
            problem, ours, bsr = _blocks(SQUARE, size, sparsity)
            for batch in batches:
                yield measure(problem.cell(batch, ours, bsr), settings, cold=True)


def blocks(settings: Settings) -> Iterator[dict]:
    """Block-sparse 4096 x 4096, warm: blocks x sparsities x batches."""
    sizes = settings.pick(((16, 1), (8, 8), (16, 16), (32, 32)), ((16, 16),))
    for size in sizes:
        for sparsity in settings.pick((0.5, 0.7, 0.9, 0.95), (0.9,)):
            problem, ours, bsr = _blocks(SQUARE, size, sparsity)
            for batch in settings.pick((1, 8, 32, 128), (32,)):
                yield measure(problem.cell(batch, ours, bsr), settings)


def _blocks(shape: tuple[int, int], size: tuple[int, int], sparsity: float):
    weight = pruned_blocks(shape, size, sparsity)
    labels = {"sparsity": sparsity, "block": f"{size[0]}x{size[1]}"}
    extra = {"bsr": lambda x: baselines.bsr_linear(x, weight, size)}
    return Problem(weight, labels), block(weight, size), extra


def nm(settings: Settings) -> Iterator[dict]:
    """2:4 along K, beside unstructured weights of the same density."""
    for shape in settings.pick((SQUARE, TALL), (TALL,)):
        dense = pruned_linear(*shape, 0.0)
        groups = dense.view(shape[0], -1, 4)
        keep = torch.zeros_like(groups).scatter_(2, groups.abs().topk(2, 2).indices, 1.0)
        problem = Problem((groups * keep).view(shape), {"sparsity": 0.5}, sparse=False)
        packed = lw.formats.NM.from_dense(problem.weight)
        free = unstructured(pruned_linear(*shape, 0.5))
        for batch in settings.pick((1, 2, 4, 8, 32, 128), (1, 32)):
            cell = problem.cell(batch, lambda x, packed=packed: lw.ops.nm_linear(x, packed))
            x = torch.randn(batch, shape[1])
            # Another weight, so its result is not compared: only how long it takes.
            yield measure(
                _with_untrue(cell, "unstructured 50 %", lambda x=x, free=free: free(x)), settings
            )


def _with_untrue(cell: Cell, name: str, call) -> Cell:
    return Cell(
        cell.labels, {**cell.calls, name: call}, {**cell.kinds, name: "note"}, cell.flops,
        cell.truth,
    )  # fmt: skip


def crossover(settings: Settings) -> Iterator[dict]:
    """Low sparsities beside dense alone, so that the plots show where sparse starts to win."""
    for shape in (SQUARE, TALL):
        for sparsity in settings.pick((0.1, 0.2, 0.3, 0.4, 0.6), (0.3,)):
            weight = pruned_linear(*shape, sparsity)
            problem = Problem(weight, {"sparsity": sparsity}, sparse=False)
            ours = unstructured(weight)
            for batch in settings.pick((1, 8, 32, 128), (1, 32)):
                yield measure(problem.cell(batch, ours), settings)


def two_threads(settings: Settings) -> Iterator[dict]:
    """Unstructured weights on two threads, warm."""
    for shape in settings.pick((SQUARE, TALL), (TALL,)):
        for sparsity in settings.pick((0.5, 0.7, 0.9, 0.95), (0.9,)):
            weight = pruned_linear(*shape, sparsity)
            problem = Problem(weight, {"sparsity": sparsity}, sparse=False)
            ours = unstructured(weight)
            for batch in settings.pick((1, 8, 32, 128), (32,)):
                yield measure(problem.cell(batch, ours), settings, threads=2)
