"""block_conv2d on a GPU: large sizes, every tile of the table, graphs, tracing, gradients."""

from __future__ import annotations

import dataclasses
import importlib
import warnings

import pytest
import torch
from torch.library import opcheck

from liveweight import ops
from liveweight.formats import BlockKernels

from ..ops.block_convs import Case, expected, expected_grads, index

kernel = pytest.importorskip("liveweight.kernels.block_conv2d", reason="triton is not installed")
checks = importlib.import_module("liveweight.kernels.block_conv2d_checks")
kernel_x = importlib.import_module("liveweight.kernels.block_conv2d_grad_x")
kernel_values = importlib.import_module("liveweight.kernels.block_conv2d_grad_values")
launching = importlib.import_module("liveweight.kernels.launch")
tiles = importlib.import_module("liveweight.kernels.tiles")

pytestmark = pytest.mark.gpu
OPS = torch.ops.liveweight
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative to the largest output: one rounding to the dtype; float32 in three TF32 products.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
LARGE = {
    "56x56": Case(64, 64, size=(56, 56), batch=8),
    "stride 2": Case(128, 256, size=(28, 28), stride=(2, 2), batch=8),
    "7x7 stride 2": Case(3, 64, (7, 7), (64, 64), (2, 2), (3, 3), batch=4, density=1.0),
    "dilation": Case(256, 256, size=(28, 28), dilation=(2, 2), padding=(2, 2), batch=2),
    "groups": Case(256, 256, size=(14, 14), groups=2, batch=4),
    "1x1": Case(512, 1024, (1, 1), (14, 14), padding=(0, 0), batch=8),
    "few pixels": Case(512, 512, size=(7, 7), batch=1, density=0.25),
    "ragged": Case(200, 300, size=(15, 17), batch=3),
}


def assert_close(got, want, dtype):
    assert got.shape == want.shape and want.numel()
    error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1)
    assert got.dtype == dtype and error <= TOLERANCE[dtype], f"error {error:.2e}"


def gradients_of(case: Case, x, packed, grad):
    """What the kept values and x should get, in float64."""
    want_x, want_weight = expected_grads(grad, x, packed.to_dense(), case)
    weight = BlockKernels.from_dense(want_weight, packed.to_dense() != 0, block=packed.block)
    return want_x, weight.values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (128, 32)], ids=str)
def test_large_convolutions_and_gradients(gpu, case, dtype, block):
    case = dataclasses.replace(case, block=block)
    x, weight, packed, bias = case.make(dtype, gpu)
    for tensor in (x, packed.values, bias):
        tensor.requires_grad_()
    y = ops.block_conv2d(x, packed, bias, activation="relu", **case.options)
    assert_close(y.detach(), expected(x.detach(), weight, bias.detach(), case, relu=True), dtype)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, packed.values), grad)
    plain = dataclasses.replace(packed, values=packed.values.detach())
    for one, want in zip(got, gradients_of(case, x.detach(), plain, grad * (y > 0)), strict=True):
        assert_close(one, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", checks.SIDES)
@pytest.mark.parametrize("other", [16, 128])
def test_every_tile_of_the_table(gpu, dtype, side, other):
    arch = launching.arch_of(torch.empty(0, device=gpu))
    case = Case(256, 256, size=(13, 11), stride=(1, 2), batch=3, block=(side, other))
    x, weight, packed, bias = case.make(dtype, gpu)
    want = expected(x, weight, bias, case)
    grad = torch.randn(want.shape, device=gpu).to(dtype)
    turned = dataclasses.replace(case, block=(other, side)).make(dtype, gpu)[2]
    _, want_values = gradients_of(case, x, packed, grad)
    want_x, _ = gradients_of(case, x, turned, grad)
    for tile in tiles.listed_tiles(f"block_conv2d/{side}", arch, dtype.itemsize):
        args = (packed.values, *index(packed), bias, *case.settings, False)
        assert_close(kernel.launch(x, *args, tile), want, dtype)
        args = (turned.values, *index(turned), x.shape, *case.settings)
        assert_close(kernel_x.launch(grad, *args, tile), want_x, dtype)
    for tile in tiles.listed_tiles(f"block_conv2d_grad_values/{side}", arch, dtype.itemsize):
        args = (x, *index(packed), packed.block, *case.settings)
        assert_close(kernel_values.launch(grad, *args, tile), want_values, dtype)


def calls(case: Case, device):
    """The three ops with their arguments."""
    x, _, packed, bias = case.make(torch.bfloat16, device)
    grad = torch.randn_like(ops.block_conv2d(x, packed, bias, **case.options))
    parts, settings = index(packed), case.settings
    return [
        (OPS.block_conv2d.default, (x, packed.values, *parts, bias, *settings, True)),
        (OPS.block_conv2d_grad_x.default, (grad, packed.values, *parts, x.shape, *settings)),
        (OPS.block_conv2d_grad_values.default, (grad, x, *parts, packed.block, *settings)),
    ]


@pytest.mark.parametrize("name", ["56x56", "1x1", "few pixels"])
def test_cuda_graph(gpu, name):
    ready = calls(LARGE[name], gpu)
    eager = [op(*args) for op, args in ready]  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [op(*args) for op, args in ready]
    graph.replay()
    for one, other in zip(captured, eager, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["stride 2", "groups", "1x1"])
def test_opcheck(gpu, name):
    for op, args in calls(LARGE[name], gpu):
        opcheck(op, args)


def test_compiles_whole(gpu):
    case = LARGE["stride 2"]
    x, _, packed, bias = case.make(torch.bfloat16, gpu)

    def step(x, values, bias):
        given = dataclasses.replace(packed, values=values)
        return ops.block_conv2d(x, given, bias, activation="relu", **case.options)

    operands = [t.clone().requires_grad_() for t in (x, packed.values, bias)]
    y = torch.compile(step, fullgraph=True)(*operands)
    want = step(*operands)
    torch.testing.assert_close(y, want)
    grad = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad(y, operands, grad),
        torch.autograd.grad(want, operands, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_every_call_gives_the_same_bits(gpu):
    for op, args in calls(LARGE["few pixels"], gpu):
        assert torch.equal(op(*args), op(*args))


def test_other_blocks_and_float64_run_in_plain_pytorch(gpu, monkeypatch):
    module = importlib.import_module("liveweight.ops.block_conv2d")
    monkeypatch.setattr(module, "_warned", False)
    case = Case(24, 24, block=(8, 8))
    x, weight, packed, bias = case.make(torch.float32, gpu)
    with pytest.warns(UserWarning, match=r"blocks \(8, 8\) .* have no kernel there"):
        y = ops.block_conv2d(x, packed, bias, **case.options)
    assert_close(y, expected(x, weight, bias, case), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.block_conv2d(x, packed, bias, **case.options)
        x, weight, packed, bias = Case().make(torch.float64, gpu)
        y = ops.block_conv2d(x, packed, bias, padding=1)
    torch.testing.assert_close(y, expected(x, weight, bias, Case()))


def test_a_batch_of_more_than_2_to_the_31_entries(gpu):
    if torch.cuda.get_device_properties(gpu).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    case = Case(64, 16, size=(128, 128), stride=(2, 2), batch=1, block=(16, 64), density=1.0)
    one, _, packed, bias = case.make(torch.bfloat16, gpu)
    batch = 2**31 // one.numel() + 2
    x = one.new_zeros(batch, 128, 128, 64).permute(0, 3, 1, 2)
    x[-1:] = one
    y = ops.block_conv2d(x, packed, bias, **case.options)
    want = ops.block_conv2d(one, packed, bias, **case.options)
    assert_close(y[-1:], want.double(), torch.bfloat16)
    grads = torch.zeros_like(y)
    grads[-1:] = grad = torch.randn_like(want)
    parts, settings = index(packed), case.settings
    got = OPS.block_conv2d_grad_values(grads, x, *parts, packed.block, *settings)
    want = OPS.block_conv2d_grad_values(grad, one, *parts, packed.block, *settings)
    assert_close(got, want.double(), torch.bfloat16)
    got = OPS.block_conv2d_grad_x(grads, packed.values, *parts, x.shape, *settings)
    want = OPS.block_conv2d_grad_x(grad, packed.values, *parts, one.shape, *settings)
    assert_close(got[-1:], want.double(), torch.bfloat16)
