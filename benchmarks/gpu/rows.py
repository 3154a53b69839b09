"""One measured call of one case, and how the calls of a case become rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from gpu_timing import Timing, time_eager, time_in_turns
from torch import Tensor

DEVICE = "cuda"
Call = Callable[[int], object]


@dataclasses.dataclass
class Row:
    """One call of one case; times of one call in microseconds.

    kind     "ours", "dense" or "sparse": whose call it is
    ratio    best dense time / this time (above 1: faster)
    sparse   best time of another sparse library / this time, None where there is none
    where    what the case is: numbers and words that targets select rows by
    flops    useful operations of the call, bytes: what it must read and write once; 0: not said
    """

    group: str
    case: str
    call: str
    kind: str
    median_us: float
    low_us: float
    high_us: float
    ratio: float
    sparse: float | None
    where: dict[str, object]
    flops: float = 0.0
    bytes: float = 0.0
    note: str = ""


@dataclasses.dataclass
class Case:
    """Calls to compare: ours, dense and other sparse ones, each made with the number of a set.

    work    name of a call -> (useful FLOPs, bytes read and written once)
    trains  the calls need gradients
    """

    group: str
    name: str
    where: dict[str, object]
    ours: Mapping[str, Call]
    dense: Mapping[str, Call]
    sparse: Mapping[str, Call] = dataclasses.field(default_factory=dict)
    work: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    sets: int = 2
    trains: bool = False

    def measure(self, eager: bool = False) -> list[Row]:
        """Time all the calls in turns, as graphs or as Python makes them; return a row for each."""
        calls = {**self.ours, **self.dense, **self.sparse}
        with torch.inference_mode(not self.trains):
            if eager:
                timings = {name: time_eager(call, self.sets) for name, call in calls.items()}
            else:
                timings = time_in_turns(calls, self.sets)
        return self._rows(timings)

    def _rows(self, timings: Mapping[str, Timing]) -> list[Row]:
        dense_us = min(timings[name].median_us for name in self.dense)
        sparse_us = min((timings[name].median_us for name in self.sparse), default=None)
        rows = []
        for name, t in timings.items():
            kind = next(k for k in ("ours", "dense", "sparse") if name in getattr(self, k))
            against = None
            if kind == "ours" and sparse_us is not None:
                against = sparse_us / t.median_us
            flops, moved = self.work.get(name, (0.0, 0.0))
            rows.append(
                Row(
                    self.group, self.name, name, kind, t.median_us, t.low_us, t.high_us,
                    dense_us / t.median_us, against, self.where, flops, moved,
                )
            )  # fmt: skip
        return rows


def check(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Raise RuntimeError unless the relative error of a result is within its tolerance."""
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    if not error <= tolerance:  # NaN fails too
        raise RuntimeError(f"{name}: wrong result, relative error {error:.2e} > {tolerance:.0e}")


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative error that a product in this dtype may have."""
    return 1e-5 if dtype == torch.float32 else 1e-2


def short(dtype: torch.dtype) -> str:
    """Return the name of a dtype in reports."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return names[dtype]


def l2_bytes() -> int:
    """Return the size of the GPU's L2 cache."""
    return torch.cuda.get_device_properties(0).L2_cache_size


def random_blocks(
    rows: int, columns: int, block: tuple[int, int], density: float, seed: int = 0
) -> Tensor:
    """Return a mask [rows, columns] that keeps whole blocks, round(density * blocks) of them."""
    height, width = -(-rows // block[0]), -(-columns // block[1])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(height * width, generator=generator)
    kept = torch.zeros(height * width, dtype=torch.bool)
    kept[order[: round(density * height * width)]] = True
    full = kept.view(height, width).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return full[:rows, :columns].contiguous().to(DEVICE)
