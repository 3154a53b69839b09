"""What the chip can do at most, activity_stats_, and calls so small that launching them counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from gpu_timing import sets_needed

from gpu import rows
from gpu.rows import Case, check, short
from liveweight import ops, reference

# (N, F, P) of x: activations of Linear layers (P = 1) and of convolutions.
ACTIVITY = [
    ((8192, 4096, 1), torch.bfloat16),
    ((8192, 4096, 1), torch.float32),
    ((64 * 197, 768, 1), torch.bfloat16),
    ((256, 784, 1), torch.float32),
    ((256, 512, 28 * 28), torch.bfloat16),
    ((256, 512, 7 * 7), torch.bfloat16),
    ((256, 64, 56 * 56), torch.float32),
    ((64, 3, 224 * 224), torch.float32),
]
PEAK_SIDE = 8192
COPY_BYTES = 1 << 30


def peak_cases() -> Iterator[Case]:
    """Yield the roofline of this run: a large cuBLAS product and a large copy."""
    side, options = PEAK_SIDE, {"device": rows.DEVICE, "dtype": torch.bfloat16}
    a, b = torch.randn(side, side, **options), torch.randn(side, side, **options)
    flops, moved = 2.0 * side**3, 3.0 * side * side * 2
    work = {"cuBLAS": (flops, moved)}
    where = {"op": "peak", "what": "compute"}
    name = f"{side}^3 bf16 product"
    yield Case("peak", name, where, {}, {"cuBLAS": lambda i: a @ b}, {}, work)
    source = torch.randn(COPY_BYTES // 4, device=rows.DEVICE)
    out = torch.empty_like(source)
    work = {"copy": (0.0, 2.0 * COPY_BYTES)}
    where = {"op": "peak", "what": "memory"}
    name = f"copy of {COPY_BYTES >> 20} MiB"
    yield Case("peak", name, where, {}, {"copy": lambda i: out.copy_(source)}, {}, work)


def activity_cases() -> Iterator[Case]:
    """Yield activity_stats_ (four statistics) beside eager mean |x|, the same four, and a copy."""
    op = torch.ops.liveweight.activity_stats_.default
    for shape, dtype in ACTIVITY:
        x_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
        sets = sets_needed(x_bytes, rows.l2_bytes())
        xs = [torch.randn(shape, device=rows.DEVICE, dtype=dtype) for _ in range(sets)]
        out = torch.empty_like(xs[0])
        stats = ops.new_activity_stats(shape[1], rows.DEVICE)
        op(stats, xs[0], 0.0)
        want = torch.zeros_like(stats)
        reference.activity_stats_(want, xs[0], 0.0)
        check("activity_stats_", stats, want, 1e-6)

        def four(i: int, xs=xs):
            a = xs[i].abs()
            return a.sum((0, 2)), (a * a).sum((0, 2)), (a > 0).sum((0, 2)), a.amax((0, 2))

        ours = {"activity_stats_": lambda i, xs=xs, stats=stats: op(stats, xs[i], 0.0)}
        dense = {
            "eager mean |x|": lambda i, xs=xs: xs[i].abs().mean((0, 2)),
            "eager all four": four,
            "copy": lambda i, xs=xs, out=out: out.copy_(xs[i]),
        }
        work = dict.fromkeys((*ours, "eager mean |x|", "eager all four"), (0.0, float(x_bytes)))
        work["copy"] = (0.0, 2.0 * x_bytes)
        where = {"op": "activity_stats_", "shape": list(shape), "dtype": short(dtype)}
        name = f"{list(shape)} {short(dtype)}"
        yield Case("activity_stats_", name, where, ours, dense, {}, work, sets)


def small_cases() -> Iterator[Case]:
    """Yield small calls as Python makes them: there the launch is what costs."""
    options = {"device": rows.DEVICE, "dtype": torch.bfloat16}
    x, weight = torch.randn(16, 256, **options), torch.randn(256, 256, **options)
    mask = torch.rand(256, 256, device=rows.DEVICE) < 0.1
    bits, stats = ops.pack_mask_bits(mask), ops.new_activity_stats(256, rows.DEVICE)
    where = {"op": "masked_linear", "shape": [16, 256, 256]}
    yield Case(
        "small calls", "[16, 256] x 256 bf16", where,
        {"masked_linear": lambda i: ops.masked_linear(x, weight, bits)},
        {"F.linear(x, weight * mask)": lambda i: F.linear(x, weight * mask)}, sets=20,
    )  # fmt: skip
    where = {"op": "activity_stats_", "shape": [16, 256]}
    yield Case(
        "small calls", "[16, 256] bf16", where,
        {"activity_stats_": lambda i: ops.activity_stats_(stats, x)},
        {"x.abs().mean(0)": lambda i: x.abs().mean(0)}, sets=20,
    )  # fmt: skip
