"""Latency of models in turns: dense, torch.compile'd dense, and the faster ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from liveweight import compress
from liveweight.compress.inputs import as_example_inputs


def measure_latency(
    dense: nn.Module, others: dict[str, nn.Module], inputs: dict[int, Tensor], with_compile: bool
) -> tuple[list[dict], list[str]]:
    """Return (tables, notes); one table {"batch", "rows"} per batch size.

    rows: {"name", "median_us", "speedup"}; median microseconds of one forward pass, speed-up
    against dense eager as the median of paired rounds: all models of a table take turns, so
    noise hits them alike.
    """
    tables, notes = [], []
    for size, x in inputs.items():
        models = {}
        if with_compile:
            try:
                models["dense, torch.compile"] = compiled(dense, x)
            except Exception as error:  # the compiler raises many kinds; a run must survive them
                reason = str(error).strip().partition("\n")[0]
                notes.append(f"torch.compile failed at batch {size}: {reason}")
        models |= others
        rows = compress.benchmark(dense, x, against=models).rows
        named = zip(("dense", *models), rows, strict=True)
        tables.append({"batch": size, "rows": [_row(name, row) for name, row in named]})
    return tables, notes


def _row(name: str, row) -> dict:
    return {"name": name, "median_us": row.median_us, "speedup": 1 / row.ratio}


def compiled(model: nn.Module, example_inputs: object) -> nn.Module:
    """Return a copy of the model compiled for inputs of exactly these shapes."""
    inputs = as_example_inputs("compiled", model, example_inputs)
    torch._dynamo.reset()
    twin = torch.compile(copy.deepcopy(model).eval(), dynamic=False)
    with torch.inference_mode():
        twin(*inputs.args, **inputs.kwargs)
    return twin
