"""Values of the Triton kernel for narrow blocks, in the interpreter or natively on a GPU."""

from __future__ import annotations

import pytest
import torch

from liveweight import ops, reference
from liveweight.formats import Block

kernel = pytest.importorskip(
    "liveweight.kernels.block_linear_narrow", reason="triton is not installed"
)
tiles = pytest.importorskip("liveweight.kernels.tiles")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of the largest output: sums are float32 on both sides; what remains is one rounding to the dtype,
# which the interpreter does for bfloat16 by cutting off.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# The interpreter's own; it says nothing about the kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
SMALL = tiles.Tile(16, 0, 32, warps=4, stages=2)
CUT = tiles.Tile(16, 0, 16, warps=4, stages=2, split=4)


def case(M, N, K, block, dtype, device, density=0.3, bias=True):
    rows, width = -(-N // block[0]), -(-K // block[1])
    kept = torch.rand(rows, width) < density
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:N, :K]
    weight = torch.where(mask, torch.randn(N, K), 0.0).to(device, dtype)
    packed = Block.from_dense(weight, mask.to(device), block=block)
    x = torch.randn(M, K, device=device).to(dtype)
    return x, packed, torch.randn(N, device=device).to(dtype) if bias else None


def run(x, packed, bias, activation=0, batch_last=False, tile=SMALL):
    index = (packed.row_offsets, packed.columns, packed.schedule)
    return kernel.launch(x, packed.values, *index, packed.shape, bias, activation, batch_last, tile)


def assert_right(got, x, packed, bias, activation=0):
    want = x.double() @ packed.to_dense().double().t()
    want = want if bias is None else want + bias.double()
    want = reference.apply_activation(want, activation)
    assert got.dtype == x.dtype and got.shape == want.shape
    if want.numel():
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1)
        assert error <= TOLERANCE[x.dtype], f"error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(16, 1), (64, 1), (32, 2), (128, 8), (64, 4)], ids=str)
def test_ragged_sizes(device, dtype, block):
    for M, N, K in [(1, 1, 1), (17, 40, 63), (16, 128, 64), (33, 70, 29)]:
        operands = case(M, N, K, block, dtype, device)
        assert_right(run(*operands), *operands)


@pytest.mark.parametrize("activation", [0, 1, 2, 3])
@pytest.mark.parametrize("tile", [SMALL, CUT], ids=["whole", "in parts"])
@pytest.mark.parametrize("batch_last", [False, True])
def test_epilogues_and_layouts(device, activation, tile, batch_last):
    x, packed, bias = case(19, 64, 120, (64, 1), torch.float32, device, density=0.8)
    got = run(x, packed, bias, activation, batch_last, tile)
    assert (got.t() if batch_last else got).is_contiguous()
    assert_right(got, x, packed, bias, activation)


def test_an_input_that_lies_turned_is_read_in_place(device):
    x, packed, bias = case(32, 64, 40, (64, 1), torch.float32, device)
    laid = x.t().contiguous().t()
    assert kernel.turn(laid).data_ptr() == laid.data_ptr()
    assert torch.equal(run(laid, packed, bias), run(x, packed, bias))
    ragged = x[:19].t().contiguous().t()  # its rows would not begin at whole 16 bytes
    assert kernel.turn(ragged).shape == (40, 32)
    assert_right(run(ragged, packed, bias), ragged, packed, bias)


def test_turning_pads_with_zeros(device):
    x = torch.randn(70, 67, device=device)
    turned = kernel.turn(x)
    assert turned.shape == (67, 80) and torch.equal(turned[:, :70], x.t())
    assert not turned[:, 70:].any()


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_kept_and_all_kept(device, density):
    x, packed, bias = case(18, 70, 33, (32, 1), torch.float32, device, density)
    assert_right(run(x, packed, bias), x, packed, bias)
    assert_right(run(x, packed, None), x, packed, None)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty_sizes(device, sizes):
    x, packed, bias = case(*sizes, (16, 1), torch.float32, device)
    for batch_last in (False, True):
        assert_right(run(x, packed, bias, 0, batch_last), x, packed, bias)


def test_an_empty_panel_between_full_ones(device):
    x, packed, bias = case(20, 48, 50, (16, 1), torch.float32, device, density=1.0)
    weight = packed.to_dense()
    weight[16:32] = 0
    packed = Block.from_dense(weight, block=(16, 1))
    got = run(x, packed, bias, tile=CUT)
    assert torch.equal(got[:, 16:32], bias[16:32].expand(20, 16))
    assert_right(got, x, packed, bias)


def test_operands_that_do_not_fit_are_refused(device):
    x, packed, bias = case(4, 16, 8, (16, 1), torch.float32, device)
    with pytest.raises(TypeError, match="expected x torch.float32, got torch.float16"):
        run(x.half(), packed, bias)
    with pytest.raises(ValueError, match=r"expected x \[M, 8\]"):
        run(x[:, :7], packed, bias)
    with pytest.raises(ValueError, match="expected bias contiguous"):
        run(x, packed, bias[:3])
    with pytest.raises(ValueError, match="expected blocks of"):
        run(x, Block.from_dense(torch.randn(16, 8, device=device), block=(8, 1)), bias)


def test_tiles_are_picked_for_every_height():
    for arch in (80, 86, 89, 90, 100):
        for height in kernel.HEIGHTS:
            for dtype in DTYPES:
                for M in (1, 40, 8192):
                    key = f"block_linear_narrow/{height}"
                    tile = tiles.pick_tile(key, (M, 4096, 4096), 0.1, dtype, arch)
                    assert tile.k >= max(kernel.WIDTHS) and tile.m >= 16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_products_on_the_gpu(gpu, dtype):
    for M, N, K in [(1, 4096, 4096), (100, 1000, 777), (2048, 1536, 1024)]:
        operands = case(M, N, K, (64, 1), dtype, gpu)
        assert_right(ops.block_linear(*operands), *operands)


@pytest.mark.gpu
def test_gradients_on_the_gpu(gpu):
    x, packed, bias = case(100, 256, 300, (64, 1), torch.float32, gpu)
    x.requires_grad_()
    values = packed.values.detach().requires_grad_()
    index = (packed.row_offsets, packed.columns)
    weight = Block(values, *index, packed.shape, packed.schedule)
    y = ops.block_linear(x, weight, bias, activation="gelu")
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in (x, values)]
    weight = Block(exact[1], *index, packed.shape, packed.schedule)
    want = torch.nn.functional.gelu(exact[0] @ weight.to_dense().t() + bias.double())
    want.backward(grad.double())
    for got, exactly in zip((x, values), exact, strict=True):
        torch.testing.assert_close(got.grad.double(), exactly.grad, rtol=1e-3, atol=1e-3)
