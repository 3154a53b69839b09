"""Call every launcher as a GPU would have it called, up to the launch itself, without a GPU.

    python tests/kernels/jit_check.py ARCH [WORD]   # one JSON object per kernel that is started

With WORD only calls with it in their names.

aot_check.py compiles what we say the JIT specialises on; here Triton's own JIT decides it from the
tensors that a launcher hands over, on a driver that names a GPU and has none. What comes out is
the kernel that would have been started, and its grid.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from liveweight import formats  # noqa: E402
from liveweight.kernels import (  # noqa: E402
    block_conv2d,
    block_conv2d_grad_values,
    block_conv2d_grad_x,
    block_linear,
    block_linear_grad,
    block_linear_narrow,
    launch,
    masked_linear,
    masked_linear_grad,
)

TOKENS, OUT, IN = 8192, 512, 256


class NamedGpu:
    """A driver that names a GPU."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Started:
    """Collects what would have been started."""

    def __init__(self) -> None:
        self.launcher = ""
        self.kernels: list[dict] = []

    def watch(self) -> None:
        run = JITFunction.run

        def compile_only(function, *args, grid, warmup, **options):
            kernel = run(function, *args, grid=grid, warmup=True, **options)
            if hasattr(kernel, "result"):
                kernel = kernel.result()
            text = kernel.asm["ptx"]
            self.kernels.append(
                {
                    "launcher": self.launcher,
                    "kernel": function.__name__,
                    "grid": list(grid),
                    "shared_bytes": kernel.metadata.shared,
                    "wgmma": text.count("wgmma.mma_async"),
                    "mma": text.count("mma.sync"),
                    "copies": text.count("cp.async.cg.shared.global"),  # 16 bytes each
                    "tma": text.count("cp.async.bulk.tensor"),
                }
            )
            return kernel

        JITFunction.run = compile_only


def blocks(shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return a weight whose blocks are kept in a chessboard's pattern."""
    rows, columns = (-(-n // side) for n, side in zip(shape, block, strict=False))
    board = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 0
    mask = board.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    mask = mask[: shape[0], : shape[1]].view(*shape[:2], *[1] * (len(shape) - 2))
    return torch.ones(shape, dtype=dtype) * mask


def linear(dtype: torch.dtype, tokens: int, block: tuple[int, int]) -> None:
    packed = formats.Block.from_dense(blocks((OUT, IN), block, dtype), block=block)
    index = (packed.row_offsets, packed.columns, packed.schedule)
    x, grad = torch.ones(tokens, IN, dtype=dtype), torch.ones(tokens, OUT, dtype=dtype)
    bias = torch.ones(OUT, dtype=dtype)
    if block[1] < 16:
        block_linear_narrow.launch(x, packed.values, *index, (OUT, IN), bias, 1)
        return
    block_linear.launch(x, packed.values, *index, (OUT, IN), bias, 2)
    block_linear.launch(x, packed.values, *index, (OUT, IN))
    block_linear.launch_grad_x(grad, packed.values, *index, (OUT, IN))
    block_linear_grad.launch_grad_values(grad, x, *index[:2], block)


def conv(dtype: torch.dtype, kernel: int, stride: int) -> None:
    shape, block = (128, 128, kernel, kernel), (64, 32)
    packed = formats.BlockKernels.from_dense(blocks(shape, block, dtype), block=block)
    index = (packed.row_offsets, packed.columns, packed.schedule)
    settings = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
    x = torch.ones(8, 128, 28, 28, dtype=dtype).contiguous(memory_format=torch.channels_last)
    bias = torch.ones(128, dtype=dtype)
    y = block_conv2d.launch(x, packed.values, *index, shape, bias, *settings, True)
    grad = torch.ones_like(y)
    block_conv2d_grad_x.launch(grad, packed.values, *index, shape, tuple(x.shape), *settings)
    block_conv2d_grad_values.launch(grad, x, *index, shape, block, *settings)


def masked(dtype: torch.dtype, tokens: int) -> None:
    x, grad = torch.ones(tokens, IN, dtype=dtype), torch.ones(tokens, OUT, dtype=dtype)
    weight, bits = torch.ones(OUT, IN, dtype=dtype), torch.ones(OUT, IN // 32, dtype=torch.int32)
    masked_linear.launch(x, weight, bits, torch.ones(OUT, dtype=dtype))
    masked_linear.launch_grad_x(grad, weight, bits)
    masked_linear_grad.launch_grad_weight(grad, x, bits)


def calls():
    """Yield (name, call): one of every kind that a user makes."""
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for tokens in (8, TOKENS) if dtype == torch.bfloat16 else (TOKENS,):
            for block in ((64, 64), (32, 16), (64, 1)):
                name = f"linear {block[0]}x{block[1]}, {tokens} tokens, {kind}"
                yield name, lambda d=dtype, t=tokens, b=block: linear(d, t, b)
            yield f"masked, {tokens} tokens, {kind}", lambda d=dtype, t=tokens: masked(d, t)
        for kernel, stride in ((3, 1), (3, 2), (1, 1)):
            name = f"conv {kernel}x{kernel}, stride {stride}, {kind}"
            yield name, lambda d=dtype, k=kernel, s=stride: conv(d, k, s)


def main() -> None:
    arch = int(sys.argv[1])
    driver.set_active(NamedGpu(arch))
    for module in (block_conv2d, block_conv2d_grad_values, block_conv2d_grad_x, block_linear,
                   block_linear_narrow, masked_linear, masked_linear_grad, block_linear_grad,
                   launch):  # fmt: skip
        if hasattr(module, "arch_of"):
            module.arch_of = lambda x: arch  # it would ask the tensor's device
    started = Started()
    started.watch()
    for name, call in calls():
        if not sys.argv[2:] or sys.argv[2] in name:
            started.launcher = name
            call()
    for kernel in started.kernels:
        print(json.dumps(kernel))


if __name__ == "__main__":
    main()
