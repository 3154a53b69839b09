"""block_linear on a GPU: large sizes, every tile of the table, graphs, tracing, gradients."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch.library import opcheck

from liveweight import nn, ops, reference
from liveweight.formats import Block

kernel = pytest.importorskip("liveweight.kernels.block_linear", reason="triton is not installed")
kernel_grad = importlib.import_module("liveweight.kernels.block_linear_grad")
tiles = importlib.import_module("liveweight.kernels.tiles")
launching = importlib.import_module("liveweight.kernels.launch")

pytestmark = pytest.mark.gpu
OPS = torch.ops.liveweight
# Relative to the largest output: one rounding to the dtype; float32 in three TF32 products.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def make(M, N, K, block, dtype, device, density=0.1):
    """Return (x, weight, bias, gradient of the output); outputs are of the order of one."""
    kept = torch.rand(-(-N // block[0]), -(-K // block[1]), device=device) < density
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:N, :K]
    dense = torch.randn(N, K, device=device) * mask / max(K * density, 1) ** 0.5
    x, grad = (torch.randn(M, n, device=device).to(dtype) for n in (K, N))
    bias = torch.randn(N, device=device).to(dtype)
    return x, Block.from_dense(dense.to(dtype), mask, block=block), bias, grad


def assert_close(got, want, dtype):
    error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1)
    assert got.dtype == dtype and error <= TOLERANCE[dtype], f"error {error:.2e}"


def run_and_check(x, weight, bias, activation="gelu"):
    """Compare the op and all its gradients with a dense layer in float64."""
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    values = weight.values.detach().requires_grad_()
    packed = Block(values, weight.row_offsets, weight.columns, weight.shape, weight.schedule)
    y = ops.block_linear(x, packed, bias, activation=activation)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in (x, values, bias)]
    dense = Block(exact[1], weight.row_offsets, weight.columns, weight.shape, weight.schedule)
    want = torch.nn.functional.linear(exact[0], dense.to_dense(), exact[2])
    want = ops.activation.apply_activation(want, ops.activation.activation_code(activation))
    want.backward(grad.double())
    assert_close(y.detach(), want.detach(), x.dtype)
    for got, exactly in zip((x, values), exact[:2], strict=True):
        assert_close(got.grad, exactly.grad, x.dtype)
    # The gradient to the bias is PyTorch's sum, whose error grows with the number of samples.
    torch.testing.assert_close(bias.grad.double(), exact[2].grad, rtol=0.05, atol=0.05)


# Every size compiles kernels of its own, so not every pair of them is taken.
@pytest.mark.parametrize(
    "dtype,block",
    [
        (torch.bfloat16, (16, 16)),
        (torch.float32, (32, 32)),
        (torch.bfloat16, (64, 64)),
        (torch.float16, (64, 128)),
        (torch.float32, (128, 16)),
        (torch.bfloat16, (128, 64)),
    ],
    ids=str,
)
def test_large_products_and_gradients(gpu, dtype, block):
    for M, N, K in [(1, 4096, 11008), (77, 1000, 777), (2048, 1536, 1024)]:
        x, weight, bias, _ = make(M, N, K, block, dtype, gpu)
        run_and_check(x, weight, bias)


def listed(gpu, op):
    return tiles.listed_tiles(op, launching.arch_of(torch.empty(0, device=gpu)), 2)


@pytest.mark.parametrize("other", [16, 128])
@pytest.mark.parametrize("side", kernel.SIDES)
def test_every_tile_of_the_product(gpu, side, other):
    x, weight, bias, _ = make(300, 520, 640, (side, other), torch.bfloat16, gpu, density=0.4)
    want = torch.relu(x.double() @ weight.to_dense().double().t() + bias.double())
    index = (weight.row_offsets, weight.columns, weight.schedule)
    for tile in listed(gpu, f"block_linear/{side}"):
        got = kernel.launch(x, weight.values, *index, weight.shape, bias, 1, tile)
        assert_close(got, want, x.dtype)


@pytest.mark.parametrize("side", kernel.SIDES)
def test_every_tile_of_the_gradients(gpu, side):
    x, weight, _, grad = make(300, 640, 520, (side, 128), torch.bfloat16, gpu, density=0.4)
    index = (weight.row_offsets, weight.columns, weight.schedule)
    exact = grad.double(), x.double()
    want = reference.block_linear_grad_values(*exact, *index, weight.block)
    for tile in listed(gpu, f"block_linear_grad_values/{side}"):
        got = kernel_grad.launch_grad_values(grad, x, *index[:2], weight.block, tile)
        assert_close(got, want, x.dtype)
    _, weight, _, grad = make(300, 640, 520, (128, side), torch.bfloat16, gpu, density=0.4)
    want = grad.double() @ weight.to_dense().double()
    index = (weight.row_offsets, weight.columns, weight.schedule)
    for tile in listed(gpu, f"block_linear/{side}"):
        got = kernel.launch_grad_x(grad, weight.values, *index, weight.shape, tile)
        assert_close(got, want, x.dtype)


def test_float32_in_one_tf32_product(gpu):
    x, weight, bias, _ = make(500, 640, 512, (64, 64), torch.float32, gpu)
    exact = x.double() @ weight.to_dense().double().t() + bias.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        got = ops.block_linear(x, weight, bias)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-2)


@pytest.mark.parametrize("M", [4, 600])
def test_cuda_graph(gpu, M):
    x, weight, bias, grad = make(M, 512, 384, (64, 64), torch.bfloat16, gpu)
    index = (weight.row_offsets, weight.columns, weight.schedule)

    def run():
        return (
            OPS.block_linear(x, weight.values, *index, weight.shape, bias, 1, False),
            OPS.block_linear_grad_x(grad, weight.values, *index, weight.shape),
            OPS.block_linear_grad_values(grad, x, *index, weight.block),
        )

    run()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_opcheck(gpu):
    x, weight, bias, grad = make(20, 64, 96, (16, 32), torch.float32, gpu, density=0.5)
    parts = (weight.values, weight.row_offsets, weight.columns, weight.schedule)
    opcheck(OPS.block_linear.default, (x, *parts, [64, 96], bias, 2, False))
    opcheck(OPS.block_linear.default, (x, *parts, [64, 96], None, 0, True))
    opcheck(OPS.block_linear_grad_x.default, (grad, *parts, [64, 96]))
    opcheck(OPS.block_linear_grad_values.default, (grad, x, *parts[1:], [16, 32]))


def test_module_compiles_and_trains(gpu):
    linear = torch.nn.Linear(256, 320).to(gpu, torch.bfloat16)
    with torch.no_grad():
        _, weight, _, _ = make(1, 320, 256, (64, 64), torch.bfloat16, gpu, density=0.3)
        linear.weight.copy_(weight.to_dense())
    module = nn.SparseLinear.from_dense(linear, "block", block=(64, 64), activation="relu")
    assert "backend=triton" in repr(module)
    x = torch.randn(3, 40, 256, device=gpu, dtype=torch.bfloat16)
    results = []
    for run in (module, torch.compile(copy.deepcopy(module), fullgraph=True)):
        inputs = x.clone().requires_grad_()
        run(inputs).square().sum().backward()
        owner = run if run is module else run._orig_mod
        results.append((inputs.grad, owner.values.grad, owner.bias.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_module_says_who_serves_it(gpu):
    linear = torch.nn.Linear(64, 64, device=gpu)
    for block, backend in [((16, 16), "triton"), ((8, 8), "reference")]:
        module = nn.SparseLinear.from_dense(linear, "block", block=block)
        assert f"backend={backend}" in repr(module)
    assert nn.SparseLinear.from_dense(linear, "block").pack().block == (128, 128)


def test_another_stream(gpu):
    x, weight, bias, _ = make(300, 256, 256, (32, 32), torch.float16, gpu)
    want = ops.block_linear(x, weight, bias)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = ops.block_linear(x, weight, bias)
    stream.synchronize()
    assert torch.equal(got, want)


def test_addresses_beyond_32_bits(gpu):
    # x and y of more than 2**31 elements each.
    M = 2**31 // 512 + 100
    weight = Block.from_dense(torch.eye(512, device=gpu, dtype=torch.bfloat16), block=(64, 64))
    x = torch.zeros(M, 512, device=gpu, dtype=torch.bfloat16)
    x[-1], x[0] = 3.0, 2.0
    y = ops.block_linear(x, weight)
    assert (y[-1] == 3).all() and (y[0] == 2).all() and not y[1].any()
