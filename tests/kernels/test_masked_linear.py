"""Values of the Triton masked_linear: in the interpreter, or on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from liveweight import ops, reference

kernel = pytest.importorskip("liveweight.kernels.masked_linear", reason="triton is not installed")
tiles = pytest.importorskip("liveweight.kernels.tiles")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative to the largest output. Sums are float32 on both sides; what remains is one rounding to
# the dtype, which the interpreter does for bfloat16 by cutting off (a whole 2**-7). float32: three
# TF32 products on a GPU, and two orders of summing up to 4096 terms.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# The interpreter's own; it says nothing about the kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
SMALL = tiles.Tile(16, 16, 32, warps=4, stages=2)
TWO_WORDS = tiles.Tile(32, 16, 64, warps=4, stages=3)


def case(M, N, K, dtype, device, keep=0.3, bias=True):
    x = torch.randn(M, K, device=device).to(dtype)
    weight = torch.randn(N, K, device=device).to(dtype)
    mask = torch.rand(N, K, device=device) < keep
    b = torch.randn(N, device=device).to(dtype) if bias else None
    return x, weight, ops.pack_mask_bits(mask), b


def assert_matches(got, operands):
    want = reference.masked_linear(*operands)
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.numel():
        scale = want.double().abs().max().clamp(min=1)
        error = (got.double() - want.double()).abs().max() / scale
        assert error <= TOLERANCE[got.dtype], f"error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [SMALL, TWO_WORDS, None], ids=["small", "two words", "picked"])
def test_ragged_sizes_equal_the_reference(device, dtype, tile):
    for M, N, K in [(1, 1, 1), (17, 33, 63), (33, 17, 64), (5, 40, 129), (16, 16, 32)]:
        operands = case(M, N, K, dtype, device)
        assert_matches(kernel.launch(*operands, tile), operands)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty_sizes(device, shape):
    operands = case(*shape, torch.float32, device)
    assert_matches(kernel.launch(*operands), operands)


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_nothing_kept_and_all_kept(device, keep):
    operands = case(20, 24, 70, torch.float32, device, keep=keep, bias=keep > 0)
    assert_matches(kernel.launch(*operands, SMALL), operands)


def test_masked_blocks_are_skipped_and_the_others_are_all_there(device):
    x, weight, _, bias = case(18, 40, 5 * 32 + 7, torch.float32, device)
    mask = torch.rand(weight.shape, device=device) < 0.5
    mask[:16, 32:64] = False  # one block of the first panel
    mask[16:32] = False  # a whole panel
    mask[32:, :96] = False  # the first blocks of a ragged panel
    x[:, 32:64] = float("nan")  # read wherever the block is not skipped
    weight = weight.masked_fill(~mask, float("nan"))  # never used, whatever it holds
    bits = ops.pack_mask_bits(mask)
    got = kernel.launch(x, weight, bits, bias, SMALL)
    assert not got.isnan().any()
    assert_matches(got, (x.nan_to_num(0), weight, bits, bias))


def test_more_blocks_than_one_listing_step(device):
    tile = tiles.Tile(16, 16, 32, warps=4, stages=2)
    K = 32 * (kernel._LIST_STEP + 3) + 5
    x, weight, _, bias = case(3, 5, K, torch.float32, device)
    mask = torch.zeros(5, K, dtype=torch.bool, device=device)
    mask[:, ::97] = True
    bits = ops.pack_mask_bits(mask)
    assert_matches(kernel.launch(x, weight, bits, bias, tile), (x, weight, bits, bias))


def test_many_tiles_are_each_computed_once(device):
    # More tiles of M than one group, ragged in both directions.
    operands = case(16 * 9 + 3, 16 * 2 + 1, 40, torch.float32, device)
    assert_matches(kernel.launch(*operands, SMALL), operands)


def test_launch_refuses_what_its_addresses_would_leave(device):
    x, weight, bits, bias = case(4, 6, 64, torch.float32, device)
    with pytest.raises(ValueError, match="expected contiguous"):
        kernel.launch(x, weight.t().contiguous().t(), bits, bias)
    with pytest.raises(ValueError, match=r"\(6, 2\)"):
        kernel.launch(x, weight, bits[:, :1].contiguous(), bias)
    with pytest.raises(TypeError, match="float16"):
        kernel.launch(x, weight.half(), bits, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_products_on_the_gpu(gpu, dtype):
    for M, N, K in [(1, 4096, 4096), (100, 1000, 777), (2048, 1536, 1024)]:
        operands = case(M, N, K, dtype, gpu)
        assert_matches(kernel.launch(*operands), operands)


@pytest.mark.gpu
def test_the_op_is_served_by_triton_and_runs_in_a_cuda_graph(gpu):
    operands = case(256, 512, 384, torch.bfloat16, gpu)
    eager = ops.masked_linear(*operands)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.masked_linear(*operands)
    graph.replay()
    assert torch.equal(captured, eager)
    assert_matches(captured, operands)
