"""The same inputs at other batch sizes: narrowed, or repeated along dimension 0."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from liveweight.compress.inputs import ExampleInputs


def check_batch_sizes(sizes: Iterable[int] | None) -> tuple[int, ...]:
    """Return the sizes in rising order, () for None. Raises TypeError and ValueError."""
    if sizes is None:
        return ()
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Iterable):
        got = type(sizes).__name__
        raise TypeError(f"compress_: batch_sizes must be a list of whole numbers, got {got}")
    sizes = list(sizes)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"compress_: batch_sizes holds {size!r}, expected whole numbers")
        if size < 1:
            raise ValueError(f"compress_: batch_sizes must be at least 1, got {size}")
    if not sizes:
        raise ValueError("compress_: batch_sizes is empty; leave it out to use the example's own")
    return tuple(sorted(set(sizes)))


def batch_of(inputs: ExampleInputs) -> int:
    """Return the first dimension of the first tensor that has one; 1 where none has."""
    return next((t.shape[0] for t in inputs.tensors() if t.dim()), 1)


def resize(x: Tensor, own: int, wanted: int) -> Tensor:
    """Return x for another batch size: dimension 0 holds a multiple of the batch.

    A tensor whose first dimension is no such multiple does not depend on the batch and stays.
    """
    if own == wanted or x.dim() == 0 or x.shape[0] % own:
        return x
    rows = x.shape[0] // own * wanted
    copies = math.ceil(rows / x.shape[0])
    return (torch.cat([x] * copies) if copies > 1 else x).narrow(0, 0, rows)


def resize_inputs(inputs: ExampleInputs, wanted: int) -> ExampleInputs:
    """Return the arguments with every tensor at another batch size."""
    own = batch_of(inputs)

    def change(leaf: object) -> object:
        same = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == own
        return resize(leaf, own, wanted) if same else leaf

    args, kwargs = pytree.tree_map(change, (inputs.args, dict(inputs.kwargs)))
    return ExampleInputs(args, kwargs)


def thresholds(sizes: Iterable[int]) -> list[float]:
    """Return the geometric means of neighbouring sizes: below the first the first serves."""
    sizes = list(sizes)
    return [math.sqrt(a * b) for a, b in zip(sizes, sizes[1:], strict=False)]
