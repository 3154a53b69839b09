"""kernelwise_conv2d beside cuDNN: whole 2-D kernels missing, in strict fp32 and in bf16."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from gpu_timing import sets_needed
from torch import Tensor

from gpu import rows
from gpu.rows import Case, check, short, tolerance_of
from liveweight import formats, ops

SPARSITIES = (0.75, 0.9, 0.95)
# (batch, in and out channels, side of the picture): VGG-16 and ResNets, on CIFAR-10 and ImageNet.
SIZES = ((32, 128, 16), (32, 256, 8), (128, 64, 32), (32, 256, 28), (1, 256, 28), (32, 512, 14))
DTYPES = (torch.float32, torch.bfloat16)


def cases() -> Iterator[Case]:
    """Yield 3x3 convolutions with random kernels removed; bf16 for the first size only."""
    for i, size in enumerate(SIZES):
        for dtype in DTYPES if i == 0 else DTYPES[:1]:
            for sparsity in SPARSITIES:
                yield _case(size, dtype, sparsity)


@contextlib.contextmanager
def strict_fp32() -> Iterator[None]:
    """Keep cuDNN from rounding float32 to TF32."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


def _case(size: tuple[int, int, int], dtype: torch.dtype, sparsity: float) -> Case:
    batch, channels, side = size
    options = {"device": rows.DEVICE, "dtype": dtype}
    set_bytes = (batch * channels * side * side + 9 * channels * channels) * dtype.itemsize
    sets = min(16, sets_needed(set_bytes, rows.l2_bytes()))
    x = [torch.randn(batch, channels, side, side, **options) for _ in range(sets)]
    last = [t.contiguous(memory_format=torch.channels_last) for t in x]
    mask = torch.rand(channels, channels, device=rows.DEVICE) >= sparsity
    weight = torch.randn(channels, channels, 3, 3, **options) / (9 * channels) ** 0.5
    pruned = weight * mask[:, :, None, None]
    packed = formats.Kernelwise.from_dense(pruned)
    bias = torch.randn(channels, **options)

    def dense(maps: Tensor, kernels: Tensor) -> Tensor:
        with strict_fp32():
            return F.conv2d(maps, kernels, bias, padding=1)

    want = F.conv2d(x[0].double(), pruned.double(), bias.double(), padding=1)
    got = ops.kernelwise_conv2d(x[0], packed, bias, padding=1)
    check("kernelwise_conv2d", got, want, tolerance_of(dtype))
    turned = weight.contiguous(memory_format=torch.channels_last)
    ours = {"kernelwise_conv2d": lambda i: ops.kernelwise_conv2d(x[i], packed, bias, padding=1)}
    calls = {
        "cuDNN": lambda i: dense(x[i], weight),
        "cuDNN, zeros in weight": lambda i: dense(x[i], pruned),
        "cuDNN, channels last": lambda i: dense(last[i], turned),
    }
    flops = 2.0 * want.numel() * channels * 9
    moved = float((x[0].numel() + want.numel()) * dtype.itemsize)
    work = dict.fromkeys(calls, (flops, moved + weight.numel() * dtype.itemsize))
    work["kernelwise_conv2d"] = (flops * packed.density, moved + packed.nbytes)
    where = {
        "op": "kernelwise_conv2d", "sparsity": sparsity, "batch": batch, "channels": channels,
        "side": side, "dtype": short(dtype),
    }  # fmt: skip
    about = f"{batch} x {channels} at {side}x{side} {short(dtype)}"
    name = f"{about}, {100 * sparsity:.0f} % of kernels"
    return Case("kernelwise_conv2d", name, where, ours, calls, {}, work, sets)
