"""Example inputs: how a model is called with them, and whether two answers are the same."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Largest difference that counts as rounding, as a fraction of the largest value: sums of some
# thousand terms in another order move by about the root of that many units in the last place.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# A GPU may multiply float32 with 10 bits of mantissa: cuDNN does unless it is told otherwise.
TOLERANCE_TF32 = 5e-3


@dataclass(frozen=True)
class ExampleInputs:
    """The arguments of one call of a model."""

    args: tuple = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Return every tensor among the arguments."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def as_example_inputs(verb: str, model: nn.Module, example_inputs: object) -> ExampleInputs:
    """Return a tensor, a tuple or list of arguments, or a dict of keyword arguments as one call.

    Raises TypeError for anything else, ValueError for no tensors at all, for an empty batch, and
    for tensors on another device than the model's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(example_inputs, ExampleInputs):
        inputs = example_inputs
    elif isinstance(example_inputs, Tensor):
        inputs = ExampleInputs(args=(example_inputs,))
    elif isinstance(example_inputs, (tuple, list)):
        inputs = ExampleInputs(args=tuple(example_inputs))
    elif isinstance(example_inputs, Mapping):
        inputs = ExampleInputs(kwargs=dict(example_inputs))
    else:
        raise TypeError(
            f"{verb}: example_inputs must be a tensor, a tuple of arguments or a dict of keyword "
            f"arguments, got {type(example_inputs).__name__}"
        )
    tensors = inputs.tensors()
    if not tensors:
        raise ValueError(f"{verb}: example_inputs holds no tensor")
    for tensor in tensors:
        if tensor.numel() == 0:
            raise ValueError(f"{verb}: example_inputs holds an empty {tuple(tensor.shape)} tensor")
    _check_device(verb, model, tensors)
    return inputs


def _check_device(verb: str, model: nn.Module, tensors: list[Tensor]) -> None:
    devices = {p.device for p in model.parameters()}
    for tensor in tensors:
        if devices and tensor.device not in devices:
            expected = ", ".join(sorted(str(d) for d in devices))
            raise ValueError(
                f"{verb}: example_inputs is on {tensor.device}, the model on {expected}"
            )


def device_of(inputs: ExampleInputs) -> torch.device:
    """Return the device of the first tensor among the arguments."""
    return inputs.tensors()[0].device


@contextlib.contextmanager
def evaluating(*modules: object) -> Iterator[None]:
    """Hold every nn.Module given in eval mode, then give each submodule its own mode back."""
    modes = [
        (m, m.training) for top in modules if isinstance(top, nn.Module) for m in top.modules()
    ]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def run(model: nn.Module, inputs: ExampleInputs) -> object:
    """Call the model once in eval mode, without gradients and from a fixed random state.

    no_grad and not inference_mode: a model may keep what it computes here, and inference tensors
    kept that way would break its training later.
    """
    with evaluating(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return model(*inputs.args, **inputs.kwargs)


def detached(outputs: object) -> object:
    """Return a copy of the outputs that later in-place changes cannot reach."""
    return pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, outputs
    )


def difference(expected: object, got: object) -> str | None:
    """Say in words how two outputs differ by more than rounding; None where they do not."""
    left, left_spec = pytree.tree_flatten(expected)
    right, right_spec = pytree.tree_flatten(got)
    if left_spec != right_spec:
        return f"the outputs have another structure: {right_spec}, expected {left_spec}"
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            words = _tensor_difference(a, b)
            if words:
                return f"output {index}: {words}" if len(left) > 1 else words
    return None


def _tensor_difference(a: Tensor, b: Tensor) -> str | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"got {tuple(b.shape)} {b.dtype}, expected {tuple(a.shape)} {a.dtype}"
    if not a.is_floating_point():
        return None if torch.equal(a, b) else "values differ"
    if a.numel() == 0:
        return None
    tolerance = _tolerance(a)
    largest, worst = (float(torch.linalg.vector_norm(t, math.inf)) for t in (a, a - b))
    if math.isfinite(worst) and worst <= tolerance * max(largest, 1e-6):
        return None  # the usual case, without masks and copies
    a, b = a.double(), b.double()
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return "infinities or NaN stand in other places"
    if not finite.any():
        return None
    largest = float(a[finite].abs().max())
    worst = float((a - b)[finite].abs().max())
    if worst <= tolerance * max(largest, 1e-6):
        return None
    return f"values differ by up to {worst:.3g} where the largest value is {largest:.3g}"


def _tolerance(tensor: Tensor) -> float:
    if tensor.is_cuda and tensor.dtype == torch.float32:
        settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
        if any(part.fp32_precision == "tf32" for part in settings):
            return TOLERANCE_TF32
    return TOLERANCE.get(tensor.dtype, 1e-4)


def max_difference(expected: object, got: object) -> float | None:
    """Return the largest absolute difference of two outputs; None where they cannot be compared."""
    left, left_spec = pytree.tree_flatten(expected)
    right, right_spec = pytree.tree_flatten(got)
    if left_spec != right_spec:
        return None
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if not isinstance(a, Tensor):
            continue
        if not isinstance(b, Tensor) or a.shape != b.shape:
            return None
        if a.numel():
            worst = max(worst, float((a.double() - b.double()).abs().max()))
    return worst
