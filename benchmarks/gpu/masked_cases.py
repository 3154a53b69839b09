"""masked_linear, forward and backward, beside cuBLAS with the mask applied in three ways."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from gpu_timing import sets_needed
from torch import Tensor

from gpu import rows
from gpu.rows import Case, check, random_blocks, short, tolerance_of
from liveweight import ops

# (M, N, K), dtype, mask: "random d" keeps single weights, "block d" keeps blocks of 64 x 64.
MASKED = [
    ((4096, 4096, 4096), torch.bfloat16, "random 1.0"),
    ((4096, 4096, 4096), torch.bfloat16, "random 0.1"),
    ((4096, 4096, 4096), torch.bfloat16, "block 0.5"),
    ((4096, 4096, 4096), torch.bfloat16, "block 0.1"),
    ((64 * 197, 3072, 768), torch.bfloat16, "random 0.1"),
    ((64 * 197, 768, 3072), torch.float16, "random 0.1"),
    ((64, 4096, 4096), torch.bfloat16, "random 0.1"),
    ((16, 11008, 4096), torch.bfloat16, "random 0.1"),
    ((16, 11008, 4096), torch.bfloat16, "block 0.1"),
    ((4096, 1024, 1024), torch.float32, "random 0.1"),
]
BLOCK = 64


def make_mask(kind: str, N: int, K: int) -> Tensor:
    """Return the mask [N, K] that a case names."""
    name, density = kind.split()
    if name == "random":
        return torch.rand(N, K, device=rows.DEVICE) < float(density)
    return random_blocks(N, K, (BLOCK, BLOCK), float(density))


class Operands:
    """Inputs, weights and gradients of one case, in as many sets as outlast the cache."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, kind: str) -> None:
        M, N, K = shape
        self.sets = min(16, sets_needed((M * K + N * K) * dtype.itemsize, rows.l2_bytes()))
        options = {"device": rows.DEVICE, "dtype": dtype}
        self.mask = make_mask(kind, N, K)
        self.bits = ops.pack_mask_bits(self.mask)
        self.x = [torch.randn(M, K, **options) for _ in range(self.sets)]
        self.weight = [torch.randn(N, K, **options) for _ in range(self.sets)]
        self.grad = [torch.randn(M, N, **options) for _ in range(self.sets)]
        self.zeroed = [w * self.mask for w in self.weight]
        self.bias = torch.randn(N, **options)


def forward_cases() -> Iterator[Case]:
    """Yield the product with a masked weight."""
    for shape, dtype, kind in MASKED:
        o = Operands(shape, dtype, kind)
        got = ops.masked_linear(o.x[0], o.weight[0], o.bits, o.bias)
        want = F.linear(o.x[0].double(), o.zeroed[0].double(), o.bias.double())
        check("masked_linear", got, want, tolerance_of(dtype))
        ours = {
            "masked_linear": lambda i, o=o: ops.masked_linear(o.x[i], o.weight[i], o.bits, o.bias)
        }
        dense = {
            "cuBLAS, weight * mask": lambda i, o=o: F.linear(o.x[i], o.weight[i] * o.mask, o.bias),
            "cuBLAS, zeros in weight": lambda i, o=o: F.linear(o.x[i], o.zeroed[i], o.bias),
            "cuBLAS, dense weight": lambda i, o=o: F.linear(o.x[i], o.weight[i], o.bias),
        }
        flops = 2.0 * shape[0] * shape[1] * shape[2]
        work = dict.fromkeys((*ours, *dense), (flops, 0.0))
        where = {"op": "masked_linear", "mask": kind, "shape": list(shape), "dtype": short(dtype)}
        name = f"M, N, K = {list(shape)} {short(dtype)}, {kind}"
        yield Case("masked_linear", name, where, ours, dense, {}, work, o.sets)


def backward_cases() -> Iterator[Case]:
    """Yield the two gradients of the product with a masked weight."""
    grad_x = torch.ops.liveweight.masked_linear_grad_x.default
    grad_weight = torch.ops.liveweight.masked_linear_grad_weight.default
    for shape, dtype, kind in MASKED[:5]:
        o = Operands(shape, dtype, kind)
        want_x = o.grad[0].double() @ o.zeroed[0].double()
        want_weight = (o.grad[0].double().t() @ o.x[0].double()) * o.mask
        tolerance = tolerance_of(dtype)
        check("masked_linear_grad_x", grad_x(o.grad[0], o.weight[0], o.bits), want_x, tolerance)
        got = grad_weight(o.grad[0], o.x[0], o.bits)
        check("masked_linear_grad_weight", got, want_weight, tolerance)

        def ours(i: int, o=o):
            return grad_x(o.grad[i], o.weight[i], o.bits), grad_weight(o.grad[i], o.x[i], o.bits)

        def masked(i: int, o=o):
            weight_grad = o.grad[i].t() @ o.x[i]
            return o.grad[i] @ (o.weight[i] * o.mask), weight_grad.mul_(o.mask)

        def plain(i: int, o=o):
            return o.grad[i] @ o.zeroed[i], o.grad[i].t() @ o.x[i]

        dense = {"cuBLAS, masks applied": masked, "cuBLAS, no masks": plain}
        where = {"op": "masked_linear backward", "mask": kind, "shape": list(shape)}
        name = f"M, N, K = {list(shape)} {short(dtype)}, {kind}"
        calls = {"masked_linear gradients": ours}
        work = dict.fromkeys((*calls, *dense), (4.0 * shape[0] * shape[1] * shape[2], 0.0))
        yield Case("masked_linear backward", name, where, calls, dense, {}, work, o.sets)
