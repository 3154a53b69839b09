"""The products that benchmarks/tune.py times: operands for one row of the table, and their result.

Operands come in sets, several times the L2 cache together, so that a call finds none of its own
there. Masks and blocks are random, those of masked_linear half of the rows full and the others with
every second weight: both of its loops count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from gpu_timing import sets_needed
from torch import Tensor

from liveweight import formats, ops, reference
from liveweight.kernels import (
    block_conv2d,
    block_conv2d_grad_values,
    block_linear,
    block_linear_grad,
    block_linear_narrow,
    masked_linear,
    masked_linear_grad,
)
from liveweight.kernels.tiles import Tile

DTYPES = {2: torch.bfloat16, 4: torch.float32}
_NARROW = 8  # columns of narrow blocks
_CONV_CHUNK = 16  # channels of a convolution's blocks
_SETTINGS = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups: 3x3 of equal size


@dataclasses.dataclass
class Problem:
    """One product.

    run   run(tile, set number) makes the product of one set
    want  result of set 0, from the reference in float32 on the operands as they are
    sets  how many there are
    """

    run: Callable[[Tile, int], Tensor]
    want: Tensor
    sets: int


@dataclasses.dataclass(frozen=True)
class _Size:
    panel: int
    shape: tuple[int, int, int]
    density: float
    dtype: torch.dtype
    device: str
    l2_bytes: int

    def make(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def sets(self, *tensors: Tensor) -> int:
        return sets_needed(sum(t.numel() * t.element_size() for t in tensors), self.l2_bytes)


def build(
    op: str,
    item_bytes: int,
    shape: tuple[int, int, int],
    density: float,
    device: str = "cuda",
    l2_bytes: int | None = None,
) -> Problem:
    """Return the product that a row of the table stands for; the same one at every call.

    Raises ValueError for an op that has no problem here.
    """
    name, _, panel = op.partition("/")
    if name not in _BUILDERS:
        raise ValueError(f"tune: no problem is known for {op}; known: {', '.join(_BUILDERS)}")
    if l2_bytes is None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    torch.manual_seed(0)
    size = _Size(int(panel or 0), shape, density, DTYPES[item_bytes], device, l2_bytes)
    return _BUILDERS[name](size)


def _half_full_mask(size: _Size, N: int, K: int) -> Tensor:
    mask = torch.rand(N, K, device=size.device) < 0.5
    mask[: N // 2] = True
    return ops.pack_mask_bits(mask)


def _finish(size: _Size, left: Tensor, right: Tensor, run, want: Tensor) -> Problem:
    """Copy the two operands that are read, once a set, and bind run(left, right, tile) to them."""
    count = size.sets(left, right)
    sets = [(left, right), *((left.clone(), right.clone()) for _ in range(count - 1))]
    return Problem(lambda tile, i: run(*sets[i], tile), want, count)


def _masked(size: _Size) -> Problem:
    M, N, K = size.shape
    x, weight, bits = size.make(M, K), size.make(N, K), _half_full_mask(size, N, K)
    want = reference.masked_linear(x.float(), weight.float(), bits, None)
    run = lambda x, w, tile: masked_linear.launch(x, w, bits, None, tile)  # noqa: E731
    return _finish(size, x, weight, run, want)


def _masked_grad_x(size: _Size) -> Problem:
    M, K, N = size.shape
    grad, weight, bits = size.make(M, N), size.make(N, K), _half_full_mask(size, N, K)
    want = reference.masked_linear_grad_x(grad.float(), weight.float(), bits)
    run = lambda g, w, tile: masked_linear.launch_grad_x(g, w, bits, tile)  # noqa: E731
    return _finish(size, grad, weight, run, want)


def _masked_grad_weight(size: _Size) -> Problem:
    N, K, M = size.shape
    grad, x, bits = size.make(M, N), size.make(M, K), _half_full_mask(size, N, K)
    want = reference.masked_linear_grad_weight(grad.float(), x.float(), bits)
    run = lambda g, x, tile: masked_linear_grad.launch_grad_weight(g, x, bits, tile)  # noqa: E731
    return _finish(size, grad, x, run, want)


def _kept(size: _Size, weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Return a mask like weight [N, K, ...] that keeps random blocks, one at least."""
    (bh, bw), (N, K) = block, weight.shape[:2]
    coarse = torch.rand(-(-N // bh), -(-K // bw), device=size.device) < size.density
    coarse[0, 0] = True
    fine = coarse.repeat_interleave(bh, 0)[:N].repeat_interleave(bw, 1)[:, :K]
    return fine.view(N, K, *(1,) * (weight.dim() - 2)).expand_as(weight).contiguous()


def _blocks(size: _Size, N: int, K: int, width: int) -> formats.Block:
    weight, block = size.make(N, K), (size.panel, width)
    return formats.Block.from_dense(weight * _kept(size, weight, block), block=block)


def _block(size: _Size) -> Problem:
    M, N, K = size.shape
    x, w = size.make(M, K), _blocks(size, N, K, size.panel)
    index = (w.row_offsets, w.columns, w.schedule)
    want = reference.block_linear(x.float(), w.values.float(), *index, (N, K), None, 0, False)

    def run(x: Tensor, values: Tensor, tile: Tile) -> Tensor:
        return block_linear.launch(x, values, *index, (N, K), None, 0, tile)

    return _finish(size, x, w.values, run, want)


def _block_narrow(size: _Size) -> Problem:
    M, N, K = size.shape
    x, w = size.make(M, K), _blocks(size, N, K, _NARROW)
    index = (w.row_offsets, w.columns, w.schedule)
    want = reference.block_linear(x.float(), w.values.float(), *index, (N, K), None, 0, False)

    def run(x: Tensor, values: Tensor, tile: Tile) -> Tensor:
        return block_linear_narrow.launch(x, values, *index, (N, K), None, 0, False, tile)

    return _finish(size, x, w.values, run, want)


def _block_grad_values(size: _Size) -> Problem:
    N, K, M = size.shape
    grad, x, w = size.make(M, N), size.make(M, K), _blocks(size, N, K, size.panel)
    block = (size.panel, size.panel)
    index = (w.row_offsets, w.columns)
    want = reference.block_linear_grad_values(grad.float(), x.float(), *index, w.schedule, block)

    def run(grad: Tensor, x: Tensor, tile: Tile) -> Tensor:
        return block_linear_grad.launch_grad_values(grad, x, *index, block, tile)

    return _finish(size, grad, x, run, want)


def _pictures(size: _Size, M: int, channels: int) -> Tensor:
    """Return [B, channels, H, W], channels last, of M pixels: square ones of 32 x 32 or smaller."""
    side = 32
    while side * side > M or M % (side * side):
        side //= 2
    x = size.make(M // side**2, channels, side, side)
    return x.contiguous(memory_format=torch.channels_last)


def _kernels(size: _Size, N: int, K: int) -> formats.BlockKernels:
    weight, block = size.make(N, K // 9, 3, 3), (size.panel, _CONV_CHUNK)
    return formats.BlockKernels.from_dense(weight * _kept(size, weight, block), block=block)


def _conv(size: _Size) -> Problem:
    M, N, K = size.shape
    x, w = _pictures(size, M, K // 9), _kernels(size, N, K)
    rest = (w.row_offsets, w.columns, w.schedule, w.shape, None, *_SETTINGS, False)
    want = reference.block_conv2d(x.float(), w.values.float(), *rest)

    def run(x: Tensor, values: Tensor, tile: Tile) -> Tensor:
        return block_conv2d.launch(x, values, *rest, tile)

    return _finish(size, x, w.values, run, want)


def _conv_grad_values(size: _Size) -> Problem:
    M, N, K = size.shape
    x, grad, w = _pictures(size, M, K // 9), _pictures(size, M, N), _kernels(size, N, K)
    block = (size.panel, _CONV_CHUNK)
    rest = (w.row_offsets, w.columns, w.schedule, w.shape, block, *_SETTINGS)
    want = reference.block_conv2d_grad_values(grad.float(), x.float(), *rest)

    def run(grad: Tensor, x: Tensor, tile: Tile) -> Tensor:
        return block_conv2d_grad_values.launch(grad, x, *rest, tile)

    return _finish(size, grad, x, run, want)


_BUILDERS: dict[str, Callable[[_Size], Problem]] = {
    "masked_linear": _masked,
    "masked_linear_grad_x": _masked_grad_x,
    "masked_linear_grad_weight": _masked_grad_weight,
    "block_linear": _block,
    "block_linear_narrow": _block_narrow,
    "block_linear_grad_values": _block_grad_values,
    "block_conv2d": _conv,
    "block_conv2d_grad_values": _conv_grad_values,
}
