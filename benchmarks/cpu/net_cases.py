"""Whole nets: dense eager, compiled dense and compressed, paired in one process."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Iterator

import nets
import torch
from torch import Tensor, nn

import liveweight as lw
from cpu.baselines import freeze
from cpu.net_limits import REST, useful_flops, without_layers
from cpu.timing import OURS, Settings, failure, paired, relative_error
from liveweight.compress.measure import torch_threads

KINDS = {"eager": "torch", "torch.compile": "dense"}
ONE_CORE = "liveweight, one core"
AGREE = 1e-4  # relative error of whole nets in fp32
QUICK = ("LeNet-300-100", "LeNet-5", "ResNet-20")


class CompiledDense:
    """torch.compile of the dense nets, frozen; one per net, batch and number of threads.

    How long a dense net takes does not depend on its values, so one compiled net serves all
    sparsities; its output is compared where it was compiled.
    """

    def __init__(self) -> None:
        self.calls: dict[tuple, object] = {}
        self.why = ""

    def get(self, key: tuple, model: nn.Module, x: Tensor):
        if key not in self.calls and not self.why:
            compiled = freeze(copy.deepcopy(model))
            try:
                with torch.inference_mode():
                    agree(f"compiled {key}", compiled(x), model(x))
            except torch._dynamo.exc.TorchDynamoException as error:
                self.why = f"torch.compile does not work here: {type(error).__name__}"
                return None
            self.calls[key] = compiled
        return self.calls.get(key)


def agree(what: str, got: Tensor, want: Tensor) -> float:
    """Return the relative error of an output; raise where it is not rounding."""
    error = relative_error(got, want)
    if not error < AGREE:
        raise RuntimeError(f"{what}: output differs by {error:.1e}")
    return error


def cases(settings: Settings) -> Iterator[tuple]:
    """Return net, granularity, sparsity, batch, threads; what the targets name comes first."""
    rounds = settings.pick(((1, 0.9), (2, 0.9), (1, 0.95), (1, 0.8)), ((1, 0.9),))
    for threads, sparsity in rounds:
        if threads > (os.cpu_count() or 1):
            continue
        for name in settings.pick(nets.NETS, QUICK):
            for granularity in nets.NETS[name].granularities:
                for batch in nets.NETS[name].batches:
                    yield name, granularity, sparsity, batch, threads


def whole_nets(settings: Settings) -> Iterator[dict]:
    """Every net, pruned at random; last classifier and first convolution stay whole."""
    settings = dataclasses.replace(settings, longest=1.5)
    torch._dynamo.config.recompile_limit = 64  # one code object serves many nets here
    compiled = CompiledDense()
    for name, granularity, sparsity, batch, threads in cases(settings):
        labels = {"net": name, "granularity": granularity, "sparsity": sparsity, "batch": batch}
        if (row := settings.find({**labels, "threads": threads})) is not None:
            yield row
            continue
        torch.set_num_threads(threads)
        model, x = nets.make(name, sparsity, granularity), nets.example(name, batch)
        again = sparsity == 0.9 and threads == 1 and name in ("VGG-like", "encoder")
        try:
            dense = compiled.get((name, batch, threads), model, x)
            again = again and not settings.quick
            others = {}
            if threads == 2 and batch == max(nets.NETS[name].batches):
                others[ONE_CORE] = on_one_core(model, x)
            yield one_net(labels, model, x, dense, settings, threads, again, others)
        except Exception as error:
            yield failure(labels, error)


def compress(model: nn.Module, x: Tensor) -> tuple[nn.Module, object, float]:
    """Return a compressed copy, its report and the seconds that choosing took."""
    sparse = copy.deepcopy(model)
    start = time.perf_counter()
    report = lw.compress_(sparse, x, cache=False)  # nothing from earlier runs
    return sparse, report, time.perf_counter() - start


def on_one_core(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Return the net compressed for one thread as a call that runs on one."""
    with torch_threads(1):
        sparse, _, _ = compress(model, x)

    def call() -> Tensor:
        with torch_threads(1):
            return sparse(x)

    return call


def one_net(labels: dict, model: nn.Module, x: Tensor, dense, settings: Settings,
            threads: int, compile_ours: bool, others: dict[str, Callable]) -> dict:  # fmt: skip
    """Return the row of one net: paired medians of the whole forward pass."""
    sparse, report, seconds = compress(model, x)
    calls = {OURS: lambda: sparse(x), "eager": lambda: model(x)}
    calls |= others
    if dense is not None:
        calls["torch.compile"] = lambda: dense(x)
    row: dict = {**labels, "threads": threads, "compress_s": seconds}
    with torch.inference_mode():
        rest, flops = without_layers(sparse, x), useful_flops(model, x)
        calls[REST] = lambda: rest(x)
        row["error"] = agree(str(labels), sparse(x), model(x))
        if compile_ours and dense is not None:
            both, row["compiled ours"] = _compiled_ours(sparse, x)
            calls |= both
    timings = paired(calls, settings)
    ratios = {n: timings.speedup(OURS, n) for n in calls if n != OURS}
    row["us"] = {n: timings.median_us(n) for n in calls}
    row["ratios"] = ratios
    row["torch"] = ratios["eager"]
    row["dense"] = min(r for n, r in ratios.items() if n in KINDS)
    if ONE_CORE in ratios:
        row["two_cores"] = ratios[ONE_CORE]
    best_us = min(us for n, us in row["us"].items() if n in KINDS)
    peak_us = flops / 1e3 / settings.peaks[threads] if threads in settings.peaks else 0.0
    row["rest"], row["limit"] = row["us"][REST], best_us / (row["us"][REST] + peak_us)
    row["changed"], row["layers"] = len(report.changed), len(report.layers)
    row["rounds"], row["busy"] = len(timings.samples[OURS]), timings.busy
    return row


def _compiled_ours(sparse: nn.Module, x: Tensor) -> tuple[dict, str]:
    """Return torch.compile of the compressed net, and why not where that does not work."""
    try:
        call = freeze(sparse)
        agree("compiled compressed net", call(x), sparse(x))
    except Exception as error:  # reported in the row; the net itself was measured
        return {}, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return {"torch.compile of ours": lambda: call(x)}, "works"
