"""The latency table of a run: dense, torch.compile'd dense, shrunk and compressed, interleaved."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from liveweight import compress
from liveweight.runs.fast import FastModel


def measure_latency(
    dense: nn.Module, fast: FastModel, inputs: dict[int, Tensor], with_compile: bool
) -> tuple[list[dict], list[str]]:
    """Return (tables, notes); one table {"batch", "rows"} per batch size.

    rows: {"name", "median_us", "speedup"}; median microseconds of one forward pass, speed-up
    against dense eager as the median of paired rounds: all models of a table take turns, so
    noise hits them alike.
    """
    tables, notes = [], []
    for size, x in inputs.items():
        models = {"dense": dense}
        if with_compile:
            try:
                models["dense, torch.compile"] = compiled(dense, x)
            except Exception as error:  # the compiler raises many kinds; a run must survive them
                reason = str(error).strip().partition("\n")[0]
                notes.append(f"torch.compile failed at batch {size}: {reason}")
        if fast.shrink_report is not None:
            models["shrunk, dense kernels"] = fast.shrunk
        models["compressed"] = fast.model
        tables.append({"batch": size, "rows": measure(models, x)})
    return tables, notes


@torch.no_grad()
def compiled(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy of the model compiled for inputs of exactly this shape."""
    torch._dynamo.reset()
    twin = torch.compile(copy.deepcopy(model).eval(), dynamic=False)
    with torch.inference_mode():
        twin(x)
    return twin


def measure(models: dict[str, nn.Module], x: Tensor) -> list[dict]:
    """Time the models in turns on x; speed-ups are medians of paired rounds against the first."""
    (first, base), *others = models.items()
    rows = compress.benchmark(base, x, against=dict(others)).rows
    return [
        {"name": name, "median_us": row.median_us, "speedup": 1 / row.ratio}
        for name, row in zip((first, *dict(others)), rows, strict=True)
    ]
