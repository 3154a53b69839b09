"""What `make gpu` times: our CUDA ops beside what PyTorch offers for the same task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu_timing import sets_needed, time_eager, time_in_turns
from torch import Tensor

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
# (M, N, K), dtype, mask: "random d" keeps single weights, "block d" keeps blocks of 64 x 64.
MASKED = [
    ((4096, 4096, 4096), torch.bfloat16, "random 0.1"),
    ((4096, 4096, 4096), torch.bfloat16, "block 0.5"),
    ((4096, 4096, 4096), torch.bfloat16, "block 0.1"),
    ((64 * 197, 3072, 768), torch.bfloat16, "random 0.1"),
    ((64 * 197, 768, 3072), torch.float16, "random 0.1"),
    ((64, 4096, 4096), torch.bfloat16, "random 0.1"),
    ((16, 11008, 4096), torch.bfloat16, "random 0.1"),
    ((16, 11008, 4096), torch.bfloat16, "block 0.1"),
    ((4096, 1024, 1024), torch.float32, "random 0.1"),
]
BLOCK = 64
DEVICE = "cuda"
SWEEP = [
    (128, 64, 64, 4, 3), (128, 64, 64, 4, 5), (128, 128, 64, 8, 3), (128, 128, 64, 8, 5),
    (256, 64, 64, 8, 3), (256, 64, 64, 8, 5), (256, 128, 64, 8, 3), (128, 256, 64, 8, 3),
]  # fmt: skip


@dataclasses.dataclass
class Row:
    """One call of one case; ratio = time of the baseline over this one's (above 1: faster)."""

    case: str
    call: str
    median_us: float
    low_us: float
    high_us: float
    ratio: float
    baseline: str
    note: str = ""


def _rows(case: str, calls: dict[str, Callable], sets: int, baseline: str, notes) -> list[Row]:
    timings = time_in_turns(calls, sets)
    base = timings[baseline].median_us
    return [
        Row(
            case, name, *dataclasses.astuple(t), base / t.median_us, baseline,
            notes(name, t.median_us),
        )
        for name, t in timings.items()
    ]  # fmt: skip


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def check(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Raise unless the relative error of a result is within its tolerance."""
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    if not error <= tolerance:  # NaN fails too
        raise RuntimeError(f"{name}: wrong result, relative error {error:.2e} > {tolerance:.0e}")


def activity_rows() -> Iterator[list[Row]]:
    """Time activity_stats_ (four statistics) beside eager mean |x|, the same four, and a copy."""
    for shape, dtype in ACTIVITY:
        x_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
        sets = sets_needed(x_bytes, _l2_bytes())
        xs = [torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(sets)]
        out = torch.empty_like(xs[0])
        stats = ops.new_activity_stats(shape[1], DEVICE)
        op = torch.ops.liveweight.activity_stats_.default

        op(stats, xs[0], 0.0)
        want = torch.zeros_like(stats)
        reference.activity_stats_(want, xs[0], 0.0)
        check("activity_stats_", stats, want, 1e-6)
        calls = _activity_calls(xs, out, stats, op)

        def note(name: str, us: float, x_bytes: int = x_bytes) -> str:
            moved = 2 * x_bytes if name == "copy" else x_bytes
            return f"{moved / us / 1e6:.2f} TB/s" if name in ("copy", "activity_stats_") else ""

        case = f"{list(shape)} {_dtype(dtype)}"
        yield _rows(case, calls, sets, "eager mean |x|", note)


def _activity_calls(xs, out, stats, op) -> dict[str, Callable[[int], object]]:
    def eager_four(i: int):
        a = xs[i].abs()
        return a.sum((0, 2)), (a * a).sum((0, 2)), (a > 0).sum((0, 2)), a.amax((0, 2))

    return {
        "activity_stats_": lambda i: op(stats, xs[i], 0.0),
        "eager mean |x|": lambda i: xs[i].abs().mean((0, 2)),
        "eager all four": eager_four,
        "copy": lambda i: out.copy_(xs[i]),
    }


def make_mask(kind: str, N: int, K: int) -> Tensor:
    name, density = kind.split()
    if name == "random":
        return torch.rand(N, K, device=DEVICE) < float(density)
    coarse = torch.rand(-(-N // BLOCK), -(-K // BLOCK), device=DEVICE) < float(density)
    return coarse.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:N, :K].contiguous()


def masked_operands(shape, dtype, kind) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, int]:
    M, N, K = shape
    sets = sets_needed((M * K + N * K) * dtype.itemsize, _l2_bytes())
    mask = make_mask(kind, N, K)
    xs = [torch.randn(M, K, device=DEVICE, dtype=dtype) for _ in range(sets)]
    ws = [torch.randn(N, K, device=DEVICE, dtype=dtype) for _ in range(sets)]
    return xs, ws, mask, torch.randn(N, device=DEVICE, dtype=dtype), sets


def masked_rows() -> Iterator[list[Row]]:
    """Time masked_linear beside cuBLAS: weight * mask made in the call, made before, dense."""
    for shape, dtype, kind in MASKED:
        xs, ws, mask, bias, sets = masked_operands(shape, dtype, kind)
        bits = ops.pack_mask_bits(mask)
        zeroed = [w * mask for w in ws]
        got = ops.masked_linear(xs[0], ws[0], bits, bias)
        want = F.linear(xs[0].double(), zeroed[0].double(), bias.double())
        check("masked_linear", got, want, 1e-5 if dtype == torch.float32 else 1e-2)
        calls = {
            "masked_linear": lambda i: ops.masked_linear(xs[i], ws[i], bits, bias),  # noqa: B023
            "cuBLAS, weight * mask": lambda i: F.linear(xs[i], ws[i] * mask, bias),  # noqa: B023
            "cuBLAS, zeros in weight": lambda i: F.linear(xs[i], zeroed[i], bias),  # noqa: B023
            "cuBLAS, dense weight": lambda i: F.linear(xs[i], ws[i], bias),  # noqa: B023
        }
        flops = 2 * shape[0] * shape[1] * shape[2]

        def note(name: str, us: float, flops: int = flops) -> str:
            return f"{flops / us / 1e6:.0f} dense TFLOP/s"

        case = f"M, N, K = {list(shape)} {_dtype(dtype)}, {kind}"
        yield _rows(case, calls, sets, "cuBLAS, weight * mask", note)


def eager_rows() -> Iterator[list[Row]]:
    """Time small calls as Python makes them: there the launch is what costs."""
    x = torch.randn(16, 256, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(256, 256, device=DEVICE, dtype=torch.bfloat16)
    mask = torch.rand(256, 256, device=DEVICE) < 0.1
    bits, stats = ops.pack_mask_bits(mask), ops.new_activity_stats(256, DEVICE)
    calls = {
        "masked_linear": lambda i: ops.masked_linear(x, weight, bits),
        "F.linear(x, weight * mask)": lambda i: F.linear(x, weight * mask),
        "activity_stats_": lambda i: ops.activity_stats_(stats, x),
        "x.abs().mean(0)": lambda i: x.abs().mean(0),
    }
    timings = {name: time_eager(call, 20) for name, call in calls.items()}
    baselines = ["F.linear(x, weight * mask)"] * 2 + ["x.abs().mean(0)"] * 2
    pairs = dict(zip(calls, baselines, strict=True))
    yield [
        Row(
            "[16, 256] x 256 bfloat16", name, *dataclasses.astuple(t),
            timings[pairs[name]].median_us / t.median_us, pairs[name], "launch included",
        )
        for name, t in timings.items()
    ]  # fmt: skip


def sweep_rows() -> Iterator[list[Row]]:
    """Time masked_linear with other tiles: what the table in kernels/tiles.py is tuned from."""
    from liveweight.kernels import masked_linear, tiles

    shape, dtype, kind = MASKED[0]
    xs, ws, mask, bias, sets = masked_operands(shape, dtype, kind)
    bits = ops.pack_mask_bits(mask)
    picked = tiles.pick_tile("masked_linear", shape, 1.0, dtype, masked_linear.arch_of(xs[0]))
    candidates = {f"{picked} (picked)": picked}
    candidates |= {str(tile): tile for tile in (tiles.Tile(*row) for row in SWEEP)}

    def call(tile):
        return lambda i: masked_linear.launch(xs[i], ws[i], bits, bias, tile)

    calls = {name: call(tile) for name, tile in candidates.items()}
    case = f"tiles, M, N, K = {list(shape)} {_dtype(dtype)}, {kind}"
    yield _rows(case, calls, sets, f"{picked} (picked)", lambda name, us: "")


GROUPS = {
    "activity_stats_": activity_rows,
    "masked_linear": masked_rows,
    "small calls": eager_rows,
    "tiles": sweep_rows,
}
