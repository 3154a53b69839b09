"""block_linear and block_conv2d beside cuBLAS, cuDNN, torch.compile and torch's own BSR."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from gpu_timing import sets_needed
from torch import Tensor

from gpu import rows
from gpu.rows import Case, check, random_blocks, short, tolerance_of
from liveweight import formats, ops

SPARSITIES = (0.5, 0.75, 0.9, 0.95)
BLOCKS = ((64, 64), (32, 32), (16, 16), (64, 1))
DTYPE = torch.bfloat16
# (tokens, out_features, in_features)
MANY = ((8192, 4096, 4096), (64 * 197, 3072, 768))
FEW = ((1, 14336, 4096), (16, 14336, 4096), (64, 14336, 4096))
# (batch, in and out channels, side of the picture, stride)
CONVS = ((64, 256, 28, 1), (64, 512, 14, 1), (1, 256, 28, 1), (64, 256, 28, 2), (64, 128, 28, 1))
# Every tap reads the picture again, so taller panels need fewer reads.
CONV_BLOCKS = ((128, 32), (64, 32))
# What is timed beside the first shape, for which all blocks are: a GPU's minutes are few.
OTHER_MANY, OTHER_FEW = BLOCKS[:1], (BLOCKS[0], BLOCKS[2])
# torch.compile tunes for some seconds per shape: one of each kind is enough to know it.
COMPILED = {MANY[0], FEW[1]}


def linear_cases() -> Iterator[Case]:
    """Yield blocks of each size at each sparsity, first for many tokens, then for few."""
    for i, shape in enumerate((*MANY, *FEW)):
        dense = _Dense(shape)
        others = OTHER_MANY if shape in MANY else OTHER_FEW
        for block in others if i else BLOCKS:
            for sparsity in SPARSITIES:
                yield _linear_case(dense, block, sparsity)


class _Dense:
    """Inputs and dense weights of one shape, in as many sets as outlast the cache."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = M, N, K = shape
        item = DTYPE.itemsize
        self.sets = min(16, sets_needed((M * K + N * K) * item, rows.l2_bytes()))
        options = {"device": rows.DEVICE, "dtype": DTYPE}
        self.x = [torch.randn(M, K, **options) for _ in range(self.sets)]
        self.weight = [torch.randn(N, K, **options) / K**0.5 for _ in range(self.sets)]
        self.bias = torch.randn(N, **options)
        self.flops = 2.0 * M * N * K
        self.bytes = float((M * K + N * K + M * N) * item)
        self.compiled = None
        if shape in COMPILED and rows.DEVICE == "cuda":
            fast = torch.compile(F.linear, mode="max-autotune-no-cudagraphs", dynamic=False)
            self.compiled = lambda i, fast=fast: fast(self.x[i], self.weight[i], self.bias)


def _linear_case(dense: _Dense, block: tuple[int, int], sparsity: float) -> Case:
    M, N, K = dense.shape
    pruned = [w * random_blocks(N, K, block, 1 - sparsity) for w in dense.weight]
    ours, work = {}, {}
    for stored in _stored(block):
        name = f"block_linear {_times(stored)}"
        packed = [formats.Block.from_dense(w, block=stored) for w in pruned]
        want = F.linear(dense.x[0].double(), pruned[0].double(), dense.bias.double())
        check(name, ops.block_linear(dense.x[0], packed[0], dense.bias), want, tolerance_of(DTYPE))
        ours[name] = lambda i, p=packed: ops.block_linear(dense.x[i], p[i], dense.bias)
        moved = (M * K + M * N) * DTYPE.itemsize + packed[0].nbytes
        work[name] = ((1 - sparsity) * dense.flops, float(moved))
        if block[1] == 1:  # a neighbour can hand over what this kernel reads as it lies
            turned = [x.t().contiguous().t() for x in dense.x]
            ours[f"{name}, x turned"] = lambda i, p=packed, x=turned: ops.block_linear(
                x[i], p[i], dense.bias, batch_last=True
            )
    calls = {
        "cuBLAS": lambda i: F.linear(dense.x[i], dense.weight[i], dense.bias),
        "cuBLAS, zeros in weight": lambda i: F.linear(dense.x[i], pruned[i], dense.bias),
    }
    work |= dict.fromkeys(calls, (dense.flops, dense.bytes))
    if dense.compiled is not None:
        calls["torch.compile"] = dense.compiled
    where = {
        "op": "block_linear", "block": _times(block), "sparsity": sparsity, "tokens": M,
        "shape": [N, K],
    }  # fmt: skip
    about = f"{M} tokens, {N}x{K} {short(DTYPE)}, blocks {_times(block)}"
    sparse = _bsr_calls(dense, pruned, block)
    name = f"{about}, {100 * sparsity:.0f} %"
    return Case("block_linear", name, where, ours, calls, sparse, work, dense.sets)


def _stored(block: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the blocks that a mask of blocks is stored in: its own, and taller unions of them."""
    return [block, *((height, block[1]) for height in (32, 64) if height > block[0])]


def _times(block: tuple[int, int]) -> str:
    return f"{block[0]}x{block[1]}"


def _bsr_calls(dense: _Dense, pruned: list[Tensor], block: tuple[int, int]) -> dict:
    """Return torch's BSR kernels as a call; empty where torch cannot run them."""
    if rows.DEVICE != "cuda" or min(block) < 16:
        return {}
    with warnings.catch_warnings():  # a beta state, and parameters tuned for another GPU
        warnings.simplefilter("ignore")
        packed = [w.to_sparse_bsr(block) for w in pruned]
        F.linear(dense.x[0], packed[0], dense.bias)
    return {"torch BSR": lambda i: F.linear(dense.x[i], packed[i], dense.bias)}


def conv_cases() -> Iterator[Case]:
    """Yield 3x3 convolutions in channels_last with panels of output channels removed."""
    for i, size in enumerate(CONVS):
        for block in CONV_BLOCKS[:1] if i else CONV_BLOCKS:
            for sparsity in SPARSITIES:
                yield _conv_case(size, block, sparsity)


def _conv_case(size: tuple[int, int, int, int], block: tuple[int, int], sparsity: float) -> Case:
    batch, channels, side, stride = size
    options = {"device": rows.DEVICE, "dtype": DTYPE}
    set_bytes = (batch * channels * side * side + 9 * channels * channels) * DTYPE.itemsize
    sets = min(16, sets_needed(set_bytes, rows.l2_bytes()))
    x = [_picture(batch, channels, side, options) for _ in range(sets)]
    mask = random_blocks(channels, channels, block, 1 - sparsity)
    scale = (9 * channels) ** -0.5
    full = [_last(torch.randn(channels, channels, 3, 3, **options) * scale) for _ in range(sets)]
    pruned = [_last(w * mask[:, :, None, None]) for w in full]
    packed = [formats.BlockKernels.from_dense(w, block=block) for w in pruned]
    bias = torch.randn(channels, **options)
    place = {"stride": stride, "padding": 1}

    want = F.conv2d(x[0].double(), pruned[0].double(), bias.double(), **place)
    check(
        "block_conv2d", ops.block_conv2d(x[0], packed[0], bias, **place), want, tolerance_of(DTYPE)
    )
    ours = {"block_conv2d": lambda i: ops.block_conv2d(x[i], packed[i], bias, **place)}
    calls = {
        "cuDNN": lambda i: F.conv2d(x[i], full[i], bias, **place),
        "cuDNN, zeros in weight": lambda i: F.conv2d(x[i], pruned[i], bias, **place),
    }
    flops = 2.0 * want.numel() * channels * 9
    moved = (x[0].numel() + want.numel()) * DTYPE.itemsize
    work = dict.fromkeys(calls, (flops, float(moved + full[0].numel() * DTYPE.itemsize)))
    work["block_conv2d"] = ((1 - sparsity) * flops, float(moved + packed[0].nbytes))
    where = {
        "op": "block_conv2d", "sparsity": sparsity, "batch": batch, "channels": channels,
        "side": side, "stride": stride, "block": _times(block),
    }  # fmt: skip
    about = f"{batch} x {channels} at {side}x{side}, stride {stride} {short(DTYPE)}"
    name = f"{about}, blocks {_times(block)}, {100 * sparsity:.0f} %"
    return Case("block_conv2d", name, where, ours, calls, {}, work, sets)


def _picture(batch: int, channels: int, side: int, options: dict) -> Tensor:
    return _last(torch.randn(batch, channels, side, side, **options))


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)
