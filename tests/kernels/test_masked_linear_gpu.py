"""masked_linear and its gradients on a GPU: sizes as in use, every tile, graphs, compilation."""

from __future__ import annotations

import pytest
import torch

from liveweight import ops, reference

kernel = pytest.importorskip("liveweight.kernels.masked_linear", reason="triton is not installed")
grad_kernel = pytest.importorskip("liveweight.kernels.masked_linear_grad")
tiles = pytest.importorskip("liveweight.kernels.tiles")

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of the largest output: sums are float32 on both sides, rounded once to the dtype; products of
# float32 are three of TF32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def case(gpu, M, N, K, dtype):
    """Return x, weight, bits, bias and a gradient; masked weights are NaN.

    Half of the rows keep everything, the others have full, mixed and empty tiles of 64 x 64.
    """
    x, grad = torch.randn(M, K, device=gpu), torch.randn(M, N, device=gpu)
    weight, bias = torch.randn(N, K, device=gpu), torch.randn(N, device=gpu)
    keep = torch.tensor([0.0, 0.5, 1.0], device=gpu)[torch.randint(3, (N // 64 + 1, K // 64 + 1))]
    mask = (
        torch.rand(N, K, device=gpu)
        < keep.repeat_interleave(64, 0)[:N].repeat_interleave(64, 1)[:, :K]
    )
    mask[: N // 2] = True
    weight = weight.masked_fill(~mask, float("nan"))
    bits = ops.pack_mask_bits(mask)
    return [t.to(dtype) for t in (x, weight)] + [bits, bias.to(dtype), grad.to(dtype)]


def assert_close(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error <= TOLERANCE[got.dtype], f"error {error:.2e}"


def assert_all_match(operands, forward=None, of_x=None, of_weight=None):
    x, weight, bits, bias, grad = operands
    want = reference.masked_linear(x, weight, bits, bias)
    assert_close(kernel.launch(x, weight, bits, bias, forward), want)
    want = reference.masked_linear_grad_x(grad, weight, bits)
    assert_close(kernel.launch_grad_x(grad, weight, bits, of_x), want)
    want = reference.masked_linear_grad_weight(grad, x, bits)
    assert_close(grad_kernel.launch_grad_weight(grad, x, bits, of_weight), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 4096, 4096), (100, 1000, 777), (2048, 1536, 1024)], ids=str)
def test_large_products(gpu, dtype, size):
    assert_all_match(case(gpu, *size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_of_the_table(gpu, dtype):
    operands = case(gpu, 300, 1000, 776, dtype)  # rows that descriptors can read, ragged tiles
    lists = [
        tiles.listed_tiles(f"masked_linear{end}", kernel.arch_of(operands[0]), dtype.itemsize)
        for end in ("", "_grad_x", "_grad_weight")
    ]
    for i in range(max(map(len, lists))):
        assert_all_match(operands, *(of[i % len(of)] for of in lists))


@pytest.mark.parametrize("size", [(4096, 4096), (1000, 777)], ids=str)
def test_large_masks_are_packed(gpu, size):
    mask = torch.rand(size, device=gpu) < 0.5
    packed = ops.pack_mask_bits(mask)
    assert torch.equal(packed, reference.pack_mask_bits(mask))
    assert torch.equal(ops.unpack_mask_bits(packed, size[1]), mask)


def test_ops_are_served_by_triton_and_run_in_cuda_graphs(gpu):
    x, weight, bits, bias, grad = case(gpu, 256, 512, 384, torch.bfloat16)
    served = torch.ops.liveweight
    calls = {
        served.masked_linear: (x, weight, bits, bias),
        served.masked_linear_grad_x: (grad, weight, bits),
        served.masked_linear_grad_weight: (grad, x, bits),
    }
    for op, args in calls.items():
        torch.library.opcheck(op.default, tuple(t.nan_to_num() for t in args))
        eager = op(*args)  # compiles outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = op(*args)
        graph.replay()
        assert torch.equal(captured, eager), "not the same bits twice"
    assert_all_match((x, weight, bits, bias, grad))


def test_a_training_step_compiles_without_a_graph_break(gpu):
    x, weight, bits, bias, _ = case(gpu, 64, 128, 96, torch.float32)
    weight = weight.nan_to_num().requires_grad_()

    def loss(weight):
        return ops.masked_linear(x, weight, bits, bias).relu().square().mean()

    compiled = torch.compile(loss, fullgraph=True)
    (got,) = torch.autograd.grad(compiled(weight), weight)
    (want,) = torch.autograd.grad(loss(weight), weight)
    torch.testing.assert_close(got, want)
