"""2:4 weights: our kernel for few tokens and torch core's backends beside cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu import rows
from gpu.rows import Case, check, short, tolerance_of
from gpu.unstructured_cases import DenseWeights
from liveweight import formats, ops
from liveweight.ops.semi_structured_torch import describe_backend, find_backend, torch_linear

DTYPE = torch.bfloat16
# (tokens, out_features, in_features)
FEW = tuple((tokens, 14336, 4096) for tokens in (1, 4, 16, 64))
MANY = ((8192, 4096, 4096), (8192, 14336, 4096), (64 * 197, 3072, 768))


def cases() -> Iterator[Case]:
    """Yield the two largest of every four kept, for few and for many tokens."""
    for shape in (*FEW, *MANY):
        yield _case(DenseWeights(shape, DTYPE))


def two_of_four(weight: Tensor) -> Tensor:
    """Return a weight [N, K] with the two smallest of every four along K set to zero."""
    groups = weight.unflatten(1, (-1, 4))
    kept = groups.abs().topk(2, dim=2).indices
    return torch.zeros_like(groups).scatter_(2, kept, groups.gather(2, kept)).flatten(1)


def _case(dense: DenseWeights) -> Case:
    M, N, K = dense.shape
    pruned = [two_of_four(w) for w in dense.weight]
    packed = [formats.SemiStructured.from_dense(w) for w in pruned]
    want = F.linear(dense.x[0].double(), pruned[0].double(), dense.bias.double())
    ours = {"nm_linear": lambda i: ops.nm_linear(dense.x[i], packed[i], dense.bias)}
    sparse = _torch_calls(dense, packed)
    for name, call in (*ours.items(), *sparse.items()):
        check(name, call(0), want, tolerance_of(dense.dtype))
    work = dict.fromkeys((*ours, *sparse), (0.5 * dense.flops, dense.moved + packed[0].nbytes))
    calls = dense.calls(pruned)
    work |= dict.fromkeys(calls, dense.work())
    where = {"op": "semi_structured", "tokens": M, "shape": [N, K]}
    name = f"{M} tokens, {N}x{K} {short(dense.dtype)}, 2:4"
    return Case("semi-structured", name, where, ours, calls, sparse, work, dense.sets)


def _torch_calls(
    dense: DenseWeights, packed: list[formats.SemiStructured]
) -> dict[str, Callable[[int], Tensor]]:
    """Return PyTorch's own 2:4 product, which nm_linear takes for many tokens, where there is one.

    It is called twice before it is timed: its search for an algorithm waits for a second call.
    """
    backend = find_backend(0) if rows.DEVICE == "cuda" else None
    if backend is None:
        return {}
    N = dense.shape[1]

    def call(i: int) -> Tensor:
        return torch_linear(
            dense.x[i], packed[i].values, packed[i].meta, N, dense.bias, 0, False, backend
        )

    call(0), call(0)
    return {f"torch, {describe_backend(0)}": call}
