"""What a pruned model costs: parameters and FLOPs counted after shrinking, latency as measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from liveweight import compress, prune
from liveweight.compress.inputs import ExampleInputs, run
from liveweight.runs.latency import compiled

COUNTS = ("kept", "dense")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Cost(Protocol):
    """A cost that falls with sparsity.

    dense       the cost of the model with nothing pruned
    resolution  sparsities closer than this cannot be told apart
    notes       what a reader must know of how it was found
    of(model)   the cost of a pruned model, a copy that may be changed
    """

    dense: float
    resolution: float
    notes: list[str]

    def of(self, model: nn.Module) -> float: ...


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, also of a model whose weights torch.nn.utils.prune computed in a call.

    Such tensors hang in the graph of autograd and refuse to be copied.
    """
    held = [
        (module, name, value)
        for module in model.modules()
        for name, value in module.__dict__.items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    try:
        for module, name, value in held:
            module.__dict__[name] = value.detach()
        return copy.deepcopy(model)
    finally:
        for module, name, value in held:
            module.__dict__[name] = value


def dense_twin(model: nn.Module) -> nn.Module:
    """Return a copy without masks and without zeros in its weights: what dense costs, not says."""
    twin = copied(model).eval()
    prune.strip_(twin)
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, (nn.Linear, *_CONVS)):
                module.weight.masked_fill_(module.weight == 0, 0.01)
    return twin


class Parameters:
    """Parameters of the shrunk model: all of them ("dense"), or without what is pruned ("kept").

    Pruned are zeros of Linear and convolution weights and masked entries of every other parameter.
    """

    resolution = 1e-4

    def __init__(self, model: nn.Module, inputs: ExampleInputs, count: str) -> None:
        self.inputs, self.count, self.notes = inputs, count, []
        self.dense = float(sum(p.numel() for p in model.parameters()))

    def of(self, model: nn.Module) -> float:
        compress.shrink_(model, self.inputs)
        total = sum(p.numel() for p in model.parameters())
        return float(total - (_pruned(model) if self.count == "kept" else 0))


def _pruned(model: nn.Module) -> int:
    """Return how many entries of a model's parameters are pruned."""
    masks = prune.masks(model)
    pruned = 0
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            mask = masks.get(f"{prefix}.{name}" if prefix else name)
            if name == "weight" and isinstance(module, (nn.Linear, *_CONVS)):
                pruned += int((parameter == 0).sum())
            elif mask is not None:
                pruned += int((~mask).sum())
    return pruned


class Flops:
    """Floating-point operations of one call of the shrunk model on the example inputs.

    Two for each multiply-add of convolutions and matrix products, attention among them, as
    torch.utils.flop_counter counts; "kept" leaves out those with a zero weight of a Linear or a
    convolution, "dense" leaves out none.
    """

    resolution = 1e-4

    def __init__(self, model: nn.Module, inputs: ExampleInputs, count: str) -> None:
        self.inputs, self.count, self.notes = inputs, count, []
        self.dense = self._flops(dense_twin(model))
        if self.dense == 0:
            raise ValueError("target_flops: the model does no convolution and no matrix product")

    def of(self, model: nn.Module) -> float:
        compress.shrink_(model, self.inputs)
        return self._flops(model)

    def _flops(self, model: nn.Module) -> float:
        idle = 0  # multiply-adds with a zero weight
        handles = []

        def watch(module: nn.Module, args: tuple, output: Tensor) -> None:
            nonlocal idle
            places = output.numel() // module.weight.shape[0]
            idle += places * int((module.weight == 0).sum())

        for module in model.modules():
            if self.count == "kept" and isinstance(module, (nn.Linear, *_CONVS)):
                handles.append(module.register_forward_hook(watch))
        try:
            with FlopCounterMode(display=False) as counter:
                run(model, self.inputs)
        finally:
            for handle in handles:
                handle.remove()
        return float(counter.get_total_flops() - 2 * idle)


class Latency:
    """Seconds of one call on the example inputs, shrunk and compressed, beside the fastest dense.

    The fastest dense is the best of the plain model, of channels_last where it has convolutions of
    images, and of torch.compile (`compile_dense`). With `relative`, the cost is dense * the median
    of the paired ratios, so that a machine that slows down meanwhile does not count; without, the
    median time.
    """

    resolution = 5e-3

    def __init__(
        self, model: nn.Module, inputs: ExampleInputs, relative: bool, compile_dense: bool = True
    ) -> None:
        self.inputs, self.relative, self.notes = inputs, relative, []
        candidates = self._dense_forms(dense_twin(model), compile_dense)
        first, *others = candidates
        found = compress.benchmark(
            candidates[first], inputs, against={name: candidates[name] for name in others}
        )
        names = {"model": first}
        best = min(found.rows, key=lambda row: row.ratio)
        self.fastest = names.get(best.name, best.name)
        self.reference = candidates[self.fastest]
        self.dense = best.median_us * 1e-6
        self.notes.append(f"the fastest dense form: {self.fastest}")

    def _dense_forms(self, twin: nn.Module, compile_dense: bool) -> dict[str, nn.Module]:
        forms = {"dense": twin}
        images = any(x.dim() == 4 for x in self.inputs.tensors())
        if images and any(isinstance(m, nn.Conv2d) for m in twin.modules()):
            last = copy.deepcopy(twin).to(memory_format=torch.channels_last)
            forms["dense, channels_last"] = last
        if compile_dense:
            try:
                forms["dense, torch.compile"] = compiled(twin, self.inputs)
            except Exception as error:  # the compiler raises many kinds
                reason = str(error).strip().partition("\n")[0]
                self.notes.append(f"torch.compile of the dense model failed: {reason}")
        return forms

    def of(self, model: nn.Module) -> float:
        prune.strip_(model.eval())
        compress.shrink_(model, self.inputs)
        compress.compress_(model, self.inputs)
        found = compress.benchmark(model, self.inputs, against={"dense": self.reference})
        busy = "other programs ran while latency was measured"
        if found.busy and busy not in self.notes:
            self.notes.append(busy)
        if self.relative:
            return self.dense / found["dense"].ratio
        return found["model"].median_us * 1e-6


class Given:
    """What a function of the caller returns for a pruned copy in eval mode, zeros permanent."""

    resolution = 5e-3

    def __init__(self, model: nn.Module, measure: Callable[[nn.Module], float]) -> None:
        self.measure, self.notes = measure, []
        self.dense = self.of(dense_twin(model))

    def of(self, model: nn.Module) -> float:
        prune.strip_(model.eval())
        found = self.measure(model)
        number = isinstance(found, (int, float)) and not isinstance(found, bool)
        if not number or not math.isfinite(found) or found <= 0:
            raise ValueError(f"measure must return seconds above 0, got {found!r}")
        return float(found)
