"""Single weights missing, few tokens: bitmap_linear and delta_linear beside cuBLAS and cuSPARSE."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu_timing import sets_needed
from torch import Tensor

from gpu import rows
from gpu.rows import Case, check, short, tolerance_of
from liveweight import formats, ops

SPARSITIES = (0.5, 0.7, 0.9, 0.95)
# (tokens, out_features, in_features): a weight that outlasts the L2 cache, and one that does not.
LARGE, SMALL = (14336, 4096), (4096, 4096)
SHAPES = (
    *((tokens, *LARGE) for tokens in (1, 2, 4, 8, 16, 64)),
    *((tokens, *SMALL) for tokens in (1, 16)),
    (1, 4096, 14336),
    (256, *LARGE),
)
DTYPE = torch.bfloat16
# Deltas are made for few tokens; beyond, the op expands the weight like any other.
DELTA_TOKENS = 64
# torch.compile tunes for some seconds per shape.
COMPILED = {(1, *LARGE), (16, *LARGE)}


def cases() -> Iterator[Case]:
    """Yield random masks of each sparsity, for each shape."""
    for shape in SHAPES:
        dense = DenseWeights(shape, DTYPE)
        for sparsity in SPARSITIES:
            yield _case(dense, sparsity)


class DenseWeights:
    """Inputs and dense weights of one shape, in as many sets as outlast the cache."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.shape = M, N, K = shape
        self.dtype = dtype
        self.sets = min(16, sets_needed((M * K + N * K) * dtype.itemsize, rows.l2_bytes()))
        options = {"device": rows.DEVICE, "dtype": dtype}
        self.x = [torch.randn(M, K, **options) for _ in range(self.sets)]
        self.weight = [torch.randn(N, K, **options) / K**0.5 for _ in range(self.sets)]
        self.bias = torch.randn(N, **options)
        self.flops = 2.0 * M * N * K
        self.moved = float((M * K + M * N) * dtype.itemsize)  # without the weight
        self.compiled = None
        if shape in COMPILED and rows.DEVICE == "cuda":
            fast = torch.compile(F.linear, mode="max-autotune-no-cudagraphs", dynamic=False)
            self.compiled = lambda i, fast=fast: fast(self.x[i], self.weight[i], self.bias)

    def calls(self, pruned: list[Tensor]) -> dict[str, Callable[[int], Tensor]]:
        """Return the dense calls: data with zeros in it can draw less power."""
        calls = {
            "cuBLAS": lambda i: F.linear(self.x[i], self.weight[i], self.bias),
            "cuBLAS, zeros in weight": lambda i: F.linear(self.x[i], pruned[i], self.bias),
        }
        return calls | ({"torch.compile": self.compiled} if self.compiled else {})

    def work(self) -> tuple[float, float]:
        """Return FLOPs and bytes of a dense call."""
        return self.flops, self.moved + self.weight[0].numel() * self.dtype.itemsize


def _case(dense: DenseWeights, sparsity: float) -> Case:
    M, N, K = dense.shape
    pruned = [w * (torch.rand_like(w, dtype=torch.float32) >= sparsity) for w in dense.weight]
    want = F.linear(dense.x[0].double(), pruned[0].double(), dense.bias.double())
    kinds = {"bitmap_linear": (formats.Bitmap, ops.bitmap_linear)}
    if M <= DELTA_TOKENS:
        kinds["delta_linear"] = (formats.Delta, ops.delta_linear)
    ours, work = {}, {}
    for name, (kind, op) in kinds.items():
        options = {"tokens": M} if kind is formats.Delta else {}
        packed = [kind.from_dense(w, **options) for w in pruned]
        check(name, op(dense.x[0], packed[0], dense.bias), want, tolerance_of(dense.dtype))
        ours[name] = lambda i, op=op, p=packed: op(dense.x[i], p[i], dense.bias)
        work[name] = ((1 - sparsity) * dense.flops, dense.moved + packed[0].nbytes)
    calls = dense.calls(pruned)
    work |= dict.fromkeys(calls, dense.work())
    where = {
        "op": "unstructured_linear", "sparsity": sparsity, "tokens": M, "shape": [N, K],
        "dense_mb": round(N * K * dense.dtype.itemsize / 1e6),
    }  # fmt: skip
    name = f"{M} tokens, {N}x{K} {short(dense.dtype)}, {100 * sparsity:.0f} %"
    sparse = _csr_calls(dense, pruned)
    return Case("unstructured_linear", name, where, ours, calls, sparse, work, dense.sets)


def _csr_calls(dense: DenseWeights, pruned: list[Tensor]) -> dict[str, Callable[[int], Tensor]]:
    """Return torch's CSR product, which is cuSPARSE's: W x^T, without the bias."""
    with warnings.catch_warnings():  # torch calls its CSR layout a beta
        warnings.simplefilter("ignore")
        packed = [w.to_sparse_csr() for w in pruned]
        turned = [x.t().contiguous() for x in dense.x]
        torch.mm(packed[0], turned[0])
    return {"torch CSR (cuSPARSE)": lambda i: torch.mm(packed[i], turned[i])}
