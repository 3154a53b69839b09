"""A model timed against others on the same inputs, in turns."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from liveweight.compress.inputs import (
    ExampleInputs,
    as_example_inputs,
    detached,
    device_of,
    evaluating,
    max_difference,
)
from liveweight.compress.measure import (
    BUSY_NOTE,
    Timings,
    measure_calls,
    quantile,
    torch_threads,
)
from liveweight.compress.report import format_table


@dataclass
class BenchmarkRow:
    """One candidate: microseconds per call over the rounds, compared with the first row.

    ratio       median of the per-round (own time / first row's time): 2.0 takes twice as long
    ratio_low, ratio_high  first and third quartile of the same
    difference  largest absolute difference to the first row's output, None if not comparable
    """

    name: str
    median_us: float
    q1_us: float
    q3_us: float
    ratio: float
    ratio_low: float
    ratio_high: float
    difference: float | None

    @property
    def iqr_us(self) -> float:
        """Interquartile range of the microseconds."""
        return self.q3_us - self.q1_us


@dataclass
class BenchmarkResult:
    """Rows in the order given, the number of rounds, and the machine they were measured on.

    busy    other programs disturbed the measurement
    """

    rows: list[BenchmarkRow] = field(default_factory=list)
    rounds: int = 0
    machine: dict[str, object] = field(default_factory=dict)
    busy: bool = False

    def __getitem__(self, name: str) -> BenchmarkRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {[row.name for row in self.rows]}")

    def table(self) -> str:
        """Return the rows and the machine as plain text."""
        rows = [
            (r.name, f"{r.median_us:.1f}", f"{r.iqr_us:.1f}", f"{r.ratio:.2f}", r.difference)
            for r in self.rows
        ]
        table = format_table(["name", "us", "IQR", "ratio", "difference"], rows)
        about = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        note = f"\n{BUSY_NOTE}" if self.busy else ""
        return f"{table}\n{self.rounds} paired rounds; {about}{note}"

    def to_json(self) -> str:
        """Return every field as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        return self.table()


def benchmark(
    model: nn.Module,
    example_inputs: object,
    against: Sequence[Callable] | Mapping[str, Callable] = (),
    *,
    threads: int | None = None,
    budget_s: float = 1.0,
    max_rounds: int = 400,
    measure: Callable[..., Timings] = measure_calls,
) -> BenchmarkResult:
    """Time a model and others on the same example inputs, in turns, in eval and inference mode.

    ratio = median over rounds of (time / time of `model` in the same round)

    example_inputs  a tensor, a tuple of arguments or a dict of keyword arguments
    against         other modules or callables: a list (named after their classes) or a dict
    threads         torch threads while measuring; None leaves them as they are
    budget_s        seconds per candidate

    Raises TypeError for a candidate that cannot be called, ValueError for unusable inputs, threads
    or budget. The candidates' modes are as before afterwards.
    """
    inputs = as_example_inputs("benchmark", model, example_inputs)
    candidates = {"model": model, **_named(against)}
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise TypeError(f"benchmark: threads must be an int, got {type(threads).__name__}")
    if threads is not None and threads < 1:
        raise ValueError(f"benchmark: threads must be at least 1, got {threads}")
    device = device_of(inputs)
    with torch_threads(threads), evaluating(*candidates.values()):
        outputs = {name: _output(call, inputs) for name, call in candidates.items()}
        calls = {name: _bind(call, inputs) for name, call in candidates.items()}
        timings = measure(calls, budget_s=budget_s, max_rounds=max_rounds, device=device)
        machine = machine_facts(device)
    rows = [_row(name, timings, outputs) for name in candidates]
    return BenchmarkResult(rows, len(timings.samples["model"]), machine, timings.busy)


def _named(against: Sequence[Callable] | Mapping[str, Callable]) -> dict[str, Callable]:
    if isinstance(against, Mapping):
        named = {str(name): call for name, call in against.items()}
        if "model" in named:
            raise ValueError('benchmark: against names a candidate "model", the first row\'s name')
    elif isinstance(against, (list, tuple)):
        named = {}
        for call in against:
            name = _describe(call)
            same = sum(n == name or n.startswith(f"{name} #") for n in named)
            named[f"{name} #{same + 1}" if same else name] = call
    else:
        got = type(against).__name__
        raise TypeError(f"benchmark: against must be a list or a dict of callables, got {got}")
    for name, call in named.items():
        if not callable(call):
            raise TypeError(
                f"benchmark: {name!r} in against is a {type(call).__name__}, not callable"
            )
    return named


def _describe(call: object) -> str:
    original = getattr(call, "_orig_mod", None)  # what torch.compile wraps
    if original is not None:
        return f"torch.compile({type(original).__name__})"
    if isinstance(call, nn.Module):
        return type(call).__name__
    return getattr(call, "__name__", type(call).__name__)


def _bind(call: Callable, inputs: ExampleInputs) -> Callable[[], object]:
    args, kwargs = inputs.args, dict(inputs.kwargs)
    if len(args) == 1 and not kwargs:
        only = args[0]
        return lambda: call(only)
    return lambda: call(*args, **kwargs)


def _output(call: Callable, inputs: ExampleInputs) -> object:
    with torch.no_grad():
        return detached(call(*inputs.args, **inputs.kwargs))


def _row(name: str, timings: Timings, outputs: dict[str, object]) -> BenchmarkRow:
    slowdowns = [1.0 / ratio for ratio in timings.speedups(name, "model")]
    low, high = timings.quartiles_us(name)
    return BenchmarkRow(
        name=name,
        median_us=timings.median_us(name),
        q1_us=low,
        q3_us=high,
        ratio=quantile(slowdowns, 0.5),
        ratio_low=quantile(slowdowns, 0.25),
        ratio_high=quantile(slowdowns, 0.75),
        difference=max_difference(outputs["model"], outputs[name]),
    )


def machine_facts(device: torch.device) -> dict[str, object]:
    """Return what a measured figure depends on: processor, threads, device, torch."""
    facts: dict[str, object] = {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def processor() -> str:
    """Return the name of this machine's processor."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
