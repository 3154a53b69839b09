"""Tables of convolutions: whole kernels removed, single weights removed, and 1x1."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import liveweight as lw
from cpu import baselines
from cpu.timing import OURS, Cell, Settings, measure

# name: (channels in, channels out, height = width, kernel, padding)
LAYERS = {
    "64@32x32": (64, 64, 32, 3, 1),
    "128@16x16": (128, 128, 16, 3, 1),
    "256@8x8": (256, 256, 8, 3, 1),
    "512@4x4": (512, 512, 4, 3, 1),
}
POINTWISE = {"256@14x14 1x1": (256, 256, 14, 1, 0)}


def pruned(layer: tuple, sparsity: float, whole: bool) -> Tensor:
    """Return a Gaussian weight without a random share of its kernels, or of its weights."""
    inp, out, _, kernel, _ = layer
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, inp, kernel, kernel, generator=generator)
    score = torch.rand(weight.shape[:2] if whole else weight.shape, generator=generator)
    mask = torch.ones(score.numel())
    mask[score.flatten().argsort()[: round(sparsity * score.numel())]] = 0
    mask = mask.view(score.shape)
    return weight * (mask[:, :, None, None] if whole else mask)


def kernels_removed(weight: Tensor) -> Callable:
    packed = lw.formats.Kernelwise.from_dense(weight)
    return lambda x, padding: lw.ops.kernelwise_conv2d(x, packed, padding=padding)


def weights_removed(weight: Tensor) -> Callable:
    packed = lw.formats.UnstructuredKernels.from_dense(weight)
    return lambda x, padding: lw.ops.unstructured_conv2d(x, packed, padding=padding)


def laid_out(x: Tensor) -> dict[str, Tensor]:
    """Return x with its channels last and with its samples last in memory: same values."""
    samples_last = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "batch_last": samples_last,
    }


def cell(name: str, layer: tuple, weight: Tensor, ours: Callable, batch: int, sparsity: float,
         sparse: bool = True, compiled: bool = False, layouts: bool = False) -> Cell:  # fmt: skip
    """Return the cell of one layer at one batch; at most eight samples are compared."""
    inp, _, side, kernel, padding = layer
    x = torch.randn(batch, inp, side, side)
    calls = {OURS: lambda: ours(x, padding), **baselines.dense_conv(x, weight, 1, padding)}
    if layouts:
        other = laid_out(x)
        calls |= {f"ours, {form}": lambda x=x: ours(x, padding) for form, x in other.items()}
    if compiled:
        calls |= baselines.compiled(x, weight, 1, padding)
    if sparse:
        calls |= baselines.im2col(x, weight, 1, padding)
    some = list(range(batch)) if batch <= 8 else [0, 1, 2, 3, *range(batch - 4, batch)]
    labels = {"layer": name, "batch": batch, "sparsity": sparsity}
    flops = 2.0 * int((weight != 0).sum()) * side * side * batch
    return Cell(
        labels, calls, baselines.CONV_KINDS, flops,
        truth=lambda: F.conv2d(x[some].double(), weight.double(), None, 1, padding),
        same=lambda y: y[some],
    )  # fmt: skip


def _rows(settings: Settings, layers: dict, pack: Callable, whole: bool, sparsities: tuple,
          batches: tuple, threads: int = 1, sparse: bool = True) -> Iterator[dict]:  # fmt: skip
    for name, layer in layers.items():
        for sparsity in sparsities:
            weight = pruned(layer, sparsity, whole)
            ours = pack(weight)
            for batch in batches:
                more = sparsity == 0.9 and sparse and not settings.quick
                compiled = more and whole and name == "64@32x32" and batch in (1, 32)
                made = cell(name, layer, weight, ours, batch, sparsity, sparse, compiled, more)
                yield measure(made, settings, threads=threads)


def conv_kernelwise(settings: Settings) -> Iterator[dict]:
    """3x3, whole kernels removed, warm."""
    sparsities = settings.pick((0.5, 0.7, 0.9, 0.95, 0.98), (0.7, 0.9))
    layers = LAYERS if not settings.quick else {"256@8x8": LAYERS["256@8x8"]}
    batches = settings.pick((1, 8, 32), (1, 32))
    yield from _rows(settings, layers, kernels_removed, True, sparsities, batches)


def conv_unstructured(settings: Settings) -> Iterator[dict]:
    """3x3, single weights removed, warm."""
    sparsities = settings.pick((0.5, 0.7, 0.9, 0.95), (0.9,))
    layers = LAYERS if not settings.quick else {"256@8x8": LAYERS["256@8x8"]}
    yield from _rows(settings, layers, weights_removed, False, sparsities, (1, 32))


def pointwise(settings: Settings) -> Iterator[dict]:
    """1x1, single weights removed (here a kernel is one weight), warm."""
    sparsities = settings.pick((0.5, 0.7, 0.9, 0.95, 0.98), (0.9,))
    batches = settings.pick((1, 8, 32), (1, 32))
    yield from _rows(settings, POINTWISE, kernels_removed, True, sparsities, batches)


def crossover_conv(settings: Settings) -> Iterator[dict]:
    """Low sparsities beside dense alone, for the plots."""
    layers = {k: LAYERS[k] for k in settings.pick(("64@32x32", "256@8x8"), ("256@8x8",))}
    sparsities = settings.pick((0.1, 0.2, 0.3, 0.4, 0.6), (0.3,))
    yield from _rows(settings, layers, kernels_removed, True, sparsities, (1, 32), sparse=False)


def conv_two_threads(settings: Settings) -> Iterator[dict]:
    """3x3, whole kernels removed, on two threads, warm."""
    layers = {k: LAYERS[k] for k in settings.pick(("64@32x32", "256@8x8"), ("256@8x8",))}
    sparsities = settings.pick((0.7, 0.9, 0.95), (0.9,))
    yield from _rows(
        settings, layers, kernels_removed, True, sparsities, (1, 32), threads=2, sparse=False
    )
