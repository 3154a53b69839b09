"""Values of the Triton block_linear and its gradients, interpreted where there is no GPU."""

from __future__ import annotations

import dataclasses
import importlib
import warnings

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings

from liveweight import ops, reference
from liveweight.formats import Block

kernel = pytest.importorskip("liveweight.kernels.block_linear", reason="triton is not installed")
kernel_grad = importlib.import_module("liveweight.kernels.block_linear_grad")
tiles = importlib.import_module("liveweight.kernels.tiles")
Tile = tiles.Tile

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative to the largest output. Sums are float32; what remains is one rounding to the dtype, which
# the interpreter does for bfloat16 by cutting off (a whole 2**-7). float32: three TF32 products on
# a GPU, and two orders of summing.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# The interpreter's own; they say nothing about the kernels.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]

STEP_IN_BLOCK = Tile(16, 0, 16, warps=4, stages=2)
BLOCKS_IN_STEP = Tile(32, 0, 64, warps=4, stages=3)
IN_PARTS = Tile(16, 0, 32, warps=4, stages=2, split=2)
BY_TMA = Tile(16, 0, 16, warps=4, stages=2, tma=True)
TILES = {
    "step in block": STEP_IN_BLOCK, "blocks in step": BLOCKS_IN_STEP, "in parts": IN_PARTS,
    "by tma": BY_TMA, "picked": None,
}  # fmt: skip


def case(M, N, K, block, dtype, device, density=0.5, bias=True):
    """Return (x, weight, bias, gradient of the output)."""
    rows, width = -(-N // block[0]), -(-K // block[1])
    kept = torch.rand(rows, width, device=device) < density
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:N, :K]
    dense = (torch.randn(N, K, device=device) * mask).to(dtype)
    b = torch.randn(N, device=device).to(dtype) if bias else None
    x, grad = (torch.randn(M, n, device=device).to(dtype) for n in (K, N))
    return x, Block.from_dense(dense, mask, block=block), b, grad


def index_of(weight):
    return weight.row_offsets, weight.columns, weight.schedule


def forward(x, weight, bias=None, activation=0, tile=None):
    args = (weight.values, *index_of(weight), weight.shape, bias, activation)
    return kernel.launch(x, *args, tile)


def gradients(grad, x, weight, tile=None):
    """Return grad_x and the dense form of grad_values."""
    grad_x = kernel.launch_grad_x(grad, weight.values, *index_of(weight), weight.shape, tile)
    args = (weight.row_offsets, weight.columns, weight.block)
    values = kernel_grad.launch_grad_values(grad, x, *args, tile)
    return grad_x, dataclasses.replace(weight, values=values).to_dense()


def expected(x, weight, bias=None, activation=0):
    y = F.linear(x.double(), weight.to_dense().double(), None if bias is None else bias.double())
    return ops.activation.apply_activation(y, activation)


def kept_mask(weight):
    return dataclasses.replace(weight, values=torch.ones_like(weight.values)).to_dense() != 0


def assert_close(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    if want.numel():
        scale = want.double().abs().max().clamp(min=1)
        error = (got.double() - want.double()).abs().max() / scale
        assert error <= TOLERANCE[dtype], f"error {error:.2e}"


def assert_all_close(operands, activation=0, tile=None):
    """Compare the product and both gradients with float64, and the product with the reference."""
    x, weight, bias, grad = operands
    got = forward(x, weight, bias, activation, tile)
    assert_close(got, expected(x, weight, bias, activation), x.dtype)
    args = (weight.values, *index_of(weight), weight.shape, bias, activation, False)
    assert_close(got, reference.block_linear(x, *args), x.dtype)
    grad_x, grad_weight = gradients(grad, x, weight, tile)
    assert_close(grad_x, grad.double() @ weight.to_dense().double(), x.dtype)
    want = (grad.double().t() @ x.double()) * kept_mask(weight)
    assert_close(grad_weight, want, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_ragged_sizes(device, dtype, tile):
    for M, N, K, block in [(1, 1, 1, (16, 16)), (17, 48, 80, (32, 64)), (33, 50, 75, (32, 16))]:
        assert_all_close(case(M, N, K, block, dtype, device), tile=TILES[tile])


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_size_block_and_tile(device, data):
    draw, sides = data.draw, st.sampled_from([16, 32])
    M, N, K = (draw(st.integers(0, most)) for most in (40, 70, 90))
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    sizes = draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 32, 64]))
    split, tma = draw(st.sampled_from([1, 2, 4])), draw(st.booleans())
    tile = Tile(sizes[0], 0, sizes[1], warps=4, stages=2, split=split, tma=tma)
    block, density = (draw(sides), draw(sides)), draw(st.sampled_from([0.1, 0.5, 1.0]))
    dtype, bias = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    operands = case(M, N, K, block, dtype, device, density, bias)
    assert_all_close(operands, draw(st.integers(0, 3)), tile)


@pytest.mark.parametrize("block", [(16, 128), (128, 16), (64, 64)])
@pytest.mark.parametrize("tile", ["step in block", "blocks in step", "by tma"])
def test_sides_of_blocks(device, block, tile):
    sizes = (20, block[0] + 16, 2 * block[1])
    assert_all_close(case(*sizes, block, torch.float32, device, density=0.8), tile=TILES[tile])


@pytest.mark.parametrize("activation", range(4))
@pytest.mark.parametrize("tile", ["blocks in step", "in parts"])
def test_activations_are_fused(device, activation, tile):
    x, weight, bias, _ = case(18, 40, 64, (16, 16), torch.float32, device)
    got = forward(x, weight, bias, activation, TILES[tile])
    assert_close(got, expected(x, weight, bias, activation), x.dtype)
    got = forward(x, weight, None, activation, TILES[tile])
    assert_close(got, expected(x, weight, None, activation), x.dtype)


def test_relu_keeps_nan(device):
    x, weight, bias, _ = case(2, 16, 16, (16, 16), torch.float32, device, density=1.0)
    bias[3] = float("nan")
    got = forward(x, weight, bias, 1, STEP_IN_BLOCK)
    assert got[:, 3].isnan().all() and got.isnan().sum() == 2


def test_a_large_tile_is_stored_in_halves(device):
    operands = case(150, 128, 32, (128, 16), torch.float32, device, density=1.0)
    tile = Tile(256, 0, 32, warps=8, stages=2)
    x, weight, bias, _ = operands
    got = forward(x, weight, bias, 2, tile)
    assert_close(got, expected(x, weight, bias, 2), x.dtype)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
def test_empty_sizes(device, shape):
    for block in ((16, 16), (128, 128)):
        assert_all_close(case(*shape, block, torch.float32, device))


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("tile", TILES)
def test_nothing_and_everything_kept(device, density, tile):
    operands = case(20, 40, 70, (16, 16), torch.float32, device, density, bias=density > 0)
    assert_all_close(operands, 1, TILES[tile])


@pytest.mark.parametrize("tile", ["step in block", "blocks in step", "in parts"])
def test_empty_panels_and_columns_beside_full_ones(device, tile):
    dense = torch.randn(80, 96, device=device)
    dense[16:48] = 0
    dense[:, 32:64] = 0
    dense[64:, :80] = 0
    weight = Block.from_dense(dense, block=(16, 16))
    x, grad = torch.randn(19, 96, device=device), torch.randn(19, 80, device=device)
    bias = torch.randn(80, device=device)
    assert_all_close((x, weight, bias, grad), 1, TILES[tile])


@pytest.mark.parametrize("tile", ["step in block", "blocks in step"])
def test_columns_that_no_panel_keeps_are_not_read(device, tile):
    x, weight, bias, grad = case(18, 40, 96, (16, 16), torch.float32, device, density=1.0)
    mask = torch.rand(weight.shape, device=device) < 2
    mask[:, 32:64] = mask[:, 80:] = mask[16:32] = False
    weight = Block.from_dense(weight.to_dense(), mask, block=(16, 16))
    want = expected(x, weight, bias), grad.double() @ weight.to_dense().double()
    x[:, 32:64] = x[:, 80:] = grad[:, 16:32] = float("nan")
    assert_close(forward(x, weight, bias, 0, TILES[tile]), want[0], x.dtype)
    got = kernel.launch_grad_x(grad, weight.values, *index_of(weight), weight.shape, TILES[tile])
    assert_close(got, want[1], x.dtype)


def test_many_tiles_are_each_computed_once(device):
    # More tiles of rows than one group, ragged in both directions.
    x, weight, bias, _ = case(16 * 9 + 3, 40, 32, (16, 16), torch.float32, device)
    got = forward(x, weight, bias, 0, STEP_IN_BLOCK)
    assert_close(got, expected(x, weight, bias), x.dtype)


@pytest.mark.parametrize("block", [(16, 16), (16, 64)])
@pytest.mark.parametrize("rows_of_tile", [16, 32, 64])
def test_tiles_of_the_values_find_their_row(device, monkeypatch, block, rows_of_tile):
    # Nine rows of blocks of uneven length, looked at four at a time.
    monkeypatch.setattr(kernel_grad, "_SEARCH", 4)
    x, weight, _, grad = case(8, 9 * 16, 4 * block[1], block, torch.float32, device)
    args = (weight.row_offsets, weight.columns, weight.block)
    tile = Tile(rows_of_tile, 16, 16, warps=4, stages=2)
    got = kernel_grad.launch_grad_values(grad, x, *args, tile)
    want = reference.block_linear_grad_values(grad, x, *index_of(weight), weight.block)
    assert_close(got, want, x.dtype)


def test_parts_are_added_in_one_order(device):
    x, weight, bias, grad = case(30, 40, 128, (16, 16), torch.float16, device, density=0.9)
    tile = Tile(16, 0, 16, warps=4, stages=2, split=4)
    first, second = (
        (forward(x, weight, bias, 2, tile), *gradients(grad, x, weight, tile)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_panels_are_cut_where_they_are_few_and_long():
    def split(M, N, K, density, side=64):
        args = (M, N, K), density, torch.bfloat16, 90
        return tiles.pick_tile(f"block_linear/{side}", *args).split

    assert split(8, 4096, 4096, 0.5) == 4
    assert split(8, 4096, 16384, 0.1) == 2
    assert split(8, 4096, 4096, 0.1) == 1  # 52 KiB a panel: adding up again is a launch of its own
    assert split(8, 16384, 4096, 0.5) == 1  # panels enough for every multiprocessor
    assert split(4096, 4096, 4096, 0.5) == 1
    # The nearest row cuts, but this panel is short: 10 blocks of 64, two steps of 128 to a part.
    assert split(8, 1024, 1024, 0.6) == 4
    x = torch.empty(8, 1024, dtype=torch.bfloat16, device="meta")
    values = torch.empty(160, 64, 64, dtype=torch.bfloat16, device="meta")
    assert kernel._pick(x, values, 64, 1024, 256).split == 1


def test_pick_tile_serves_every_panel():
    for arch in (80, 86, 89, 90, 100, 120):
        for dtype in DTYPES:
            for side in kernel.SIDES:
                for M in (1, 16, 17, 64, 65, 512, 100000):
                    tile = tiles.pick_tile(f"block_linear/{side}", (M, 512, 512), 0.1, dtype, arch)
                    assert tile.n == side and tile.m >= 16 and tile.k >= 16
                    assert not tile.tma or arch >= 90
                    values = f"block_linear_grad_values/{side}"
                    tile = tiles.pick_tile(values, (512, 512, M), 0.1, dtype, arch)
                    assert tile.n == side and tile.m >= 16 and tile.k >= 16


def test_launchers_refuse_what_their_addresses_would_leave(device):
    x, weight, bias, grad = case(4, 20, 40, (16, 16), torch.float32, device, density=1.0)
    values, index, shape = weight.values, index_of(weight), weight.shape
    for error, message, args in [
        (ValueError, "expected x contiguous", (x.t().contiguous().t(), values, *index, shape)),
        (ValueError, r"expected x contiguous \(4, 40\)", (x[:, 1:], values, *index, shape)),
        (TypeError, "expected x float32, got float16", (x.half(), values, *index, shape)),
        (TypeError, "expected values bfloat16, float16, float32, got float64",
         (x, values.double(), *index, shape)),
        (ValueError, "expected sides in", (x, values[:, :8], *index, shape)),
        (ValueError, "expected values contiguous", (x, values.mT, *index, shape)),
        (ValueError, r"expected row_offsets contiguous \(4,\)", (x, values, *index, (40, 40))),
        (ValueError, r"expected columns contiguous \(5,\)", (x, values[1:], *index, shape)),
        (ValueError, "expected schedule contiguous",
         (x, values, *index[:2], index[2][1:], shape)),
        (TypeError, "expected columns int32, got int64",
         (x, values, index[0], index[1].long(), index[2], shape)),
        (ValueError, "expected bias contiguous", (x, values, *index, shape, bias[1:])),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            kernel.launch(*args)
    with pytest.raises(ValueError, match="expected grad contiguous"):
        kernel.launch_grad_x(grad[:, 1:], values, *index, shape)
    with pytest.raises(ValueError, match=r"expected x contiguous \(4, 40\)"):
        kernel_grad.launch_grad_values(grad, x[:3], *index[:2], (16, 16))
    with pytest.raises(ValueError, match=r"sides in .* got block \(8, 16\)"):
        kernel_grad.launch_grad_values(grad, x, *index[:2], (8, 16))


@pytest.fixture
def op():
    """The module of the op, with its warning unsaid."""
    module = importlib.import_module("liveweight.ops.block_linear")
    module._warned = False
    yield module
    module._warned = False


def test_the_op_takes_any_layout(device, op):
    x, weight, bias, _ = case(9, 40, 48, (16, 16), torch.float32, device)
    rest = (weight.values, *index_of(weight), weight.shape, bias, 1)
    got = op._launch(x.t().contiguous().t(), *rest, True)
    assert got.t().is_contiguous()
    assert_close(got, expected(x, weight, bias, 1), x.dtype)


@pytest.mark.parametrize("block", [(8, 8), (12, 1), (48, 16)])
def test_other_blocks_run_the_reference_with_one_warning(device, op, block):
    x, weight, bias, grad = case(3, 96, 48, block, torch.float32, device)
    rest = (weight.values, *index_of(weight), weight.shape)
    with pytest.warns(UserWarning, match=rf"blocks \({block[0]}, {block[1]}\) have no kernel"):
        got = op._launch(x, *rest, bias, 0, False)
    assert_close(got, expected(x, weight, bias), x.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = op._launch_grad_x(grad, *rest)
        values = op._launch_grad_values(grad, x, *index_of(weight), weight.block)
    assert_close(got, grad.double() @ weight.to_dense().double(), x.dtype)
    want = reference.block_linear_grad_values(grad, x, *index_of(weight), weight.block)
    assert torch.equal(values, want)


def test_float64_runs_the_reference_without_a_warning(device, op):
    x, weight, bias, _ = case(3, 32, 48, (16, 16), torch.float64, device)
    rest = (weight.values, *index_of(weight), weight.shape, bias, 0, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(op._launch(x, *rest), expected(x, weight, bias))
