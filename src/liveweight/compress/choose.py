"""compress_: every layer gets the fastest module on its own input, dense included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from liveweight import _graph
from liveweight.compress import chains, edit
from liveweight.compress.batches import batch_of, check_batch_sizes, resize_inputs
from liveweight.compress.cache import ChoiceCache, cache_path
from liveweight.compress.calibrate import calibrated
from liveweight.compress.candidates import check_formats
from liveweight.compress.chooser import Chooser, Settings
from liveweight.compress.cost_model import CostModel
from liveweight.compress.inputs import (
    ExampleInputs,
    as_example_inputs,
    detached,
    device_of,
    difference,
    run,
)
from liveweight.compress.listing import list_layers
from liveweight.compress.measure import Timings, measure_calls
from liveweight.compress.replacement import Replacement
from liveweight.compress.report import CompressReport
from liveweight.compress.residual import JoinedBlock, join_blocks
from liveweight.compress.whole import Whole


def compress_(
    model: nn.Module,
    example_inputs: object,
    formats: str | Iterable[str] = "auto",
    min_speedup: float = 1.0,
    *,
    batch_sizes: Iterable[int] | None = None,
    cache: bool = True,
    budget_s: float = 0.05,
    measure: Callable[..., Timings] = measure_calls,
    cost_model: CostModel | None = None,
    compile_dense: bool = True,
) -> CompressReport:
    """Replace pruned layers by sparse ones where that is measurably faster; never slower.

    Every Linear and Conv2d is timed dense, in every fitting format and, on a CPU, dense with a
    weight packed for oneDNN, in turns, on the input it really receives. BatchNorm in eval mode is
    folded into it, ReLU (of a Linear also GELU) and max pooling behind it join it where they are
    modules of their own. What a cost model calibrated on this machine expects to take 1.5 times as
    long as the best candidate is not built. The fastest replaces the layer if the lower quartile
    of dense time / its time over the rounds reaches min_speedup, and if it does so in the calmest
    rounds too. A residual block whose last convolution was replaced becomes an nn.Residual, which
    writes its sum over the branch's output. Then layouts that neighbours may hand to each other are
    tried. The whole model is timed dense and compressed at last; choices that do not help are
    undone.

    On a GPU every candidate is a CUDA graph replayed on a cold L2 cache; what beats the layer as
    PyTorch runs it must beat torch.compile(mode="max-autotune") of it as well; and the whole model
    must be no slower as graphs and as Python calls it.

    model           changed in place; weights never change, but where a BatchNorm is folded into
                    them; masks go where the zeros are in a format and stay where a layer stays
                    dense
    example_inputs  a tensor, a tuple of arguments or a dict of keyword arguments, of the shapes
                    and on the device that matter
    formats         "auto" or names of formats; "dense" stands for packed dense layers
    min_speedup     at least 1.0
    batch_sizes     measure at each of these instead of the example's own; where no single format
                    serves all of them, the layer chooses by batch size at run time (nn.ByBatch)
    cache           remember times of equal layers on this machine, in a file of the user's cache
                    folder; LIVEWEIGHT_CACHE names another folder or is "off"
    budget_s        seconds of measuring per candidate
    measure         what times the calls; with another one than measure_calls nothing is predicted
                    unless cost_model is given
    cost_model      predicts times; None: one that calibrates itself on this machine's CPU
    compile_dense   on a GPU: race against torch.compile of the dense layer too, which takes seconds
                    to compile for each layer that would change
    returns         CompressReport: per layer what was chosen, times and the reason

    Raises TypeError and ValueError for unusable arguments, RuntimeError where the compressed
    model disagrees on example_inputs; the model is then as it was.
    """
    inputs = as_example_inputs("compress_", model, example_inputs)
    if isinstance(budget_s, bool) or not isinstance(budget_s, (int, float)) or not budget_s > 0:
        raise ValueError(f"compress_: budget_s must be a number above 0, got {budget_s!r}")
    device = device_of(inputs)
    if cost_model is None and measure is measure_calls and device.type == "cpu":
        cost_model = calibrated()
    settings = Settings(
        formats=check_formats(formats),
        threshold=_check_speedup(min_speedup),
        device=device,
        own_batch=batch_of(inputs),
        batch_sizes=check_batch_sizes(batch_sizes),
        budget_s=budget_s,
        measure=measure,
        cost_model=cost_model,
        cache=ChoiceCache(cache_path() if cache else None),
        compiles=bool(compile_dense) and device.type == "cuda" and measure is measure_calls,
    )
    with edit.undone_on_error(model):
        return _compress(model, inputs, settings)


def _check_speedup(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"compress_: min_speedup must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < 1.0:
        raise ValueError(
            f"compress_: min_speedup must be at least 1.0: slower is never taken; got {value}"
        )
    return float(value)


def _compress(model: nn.Module, inputs: ExampleInputs, settings: Settings) -> CompressReport:
    """Choose layer by layer, then check and measure the whole."""
    report = CompressReport(threads=torch.get_num_threads(), device=str(settings.device))
    report.layers, wanted = list_layers(model)
    found, outputs = chains.sample(model, inputs, set(wanted))
    expected = detached(outputs)
    graph = _trace(model, report) if wanted else None
    chooser = Chooser(model, settings, report)
    chosen = []
    for name, row in wanted.items():
        layer = graph.layers.get(name) if graph else None
        replacement = chooser.choose(name, row, found, layer)
        chosen += [replacement] if replacement else []
    problem = settings.cache.write()
    report.notes += [problem] if problem else []
    joined = join_blocks(model, graph, chosen)
    _check_whole(model, inputs, expected, [*chosen, *joined])
    sizes = settings.batch_sizes or (settings.own_batch,)
    at_sizes = {size: resize_inputs(inputs, size) for size in sizes}
    Whole(model, at_sizes, settings, report).settle(chosen, joined, chooser.ties, graph)
    return report


def _trace(model: nn.Module, report: CompressReport) -> _graph.Graph | None:
    try:
        return _graph.trace(model)
    except _graph.GraphError as error:
        report.notes.append(f"no layers were joined: {error}")
        return None


def _check_whole(
    model: nn.Module,
    inputs: ExampleInputs,
    expected: object,
    chosen: list[Replacement | JoinedBlock],
) -> None:
    for replacement in chosen:
        replacement.apply()
    words = difference(expected, run(model, inputs))
    if words:
        raise RuntimeError(f"compress_: the compressed model disagrees: {words}")
