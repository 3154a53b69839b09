"""Values of the Triton masked_linear and its gradients: interpreted, or on a GPU where one is."""

from __future__ import annotations

import importlib
import random

import pytest
import torch

from liveweight import ops, reference

kernel = pytest.importorskip("liveweight.kernels.masked_linear", reason="triton is not installed")
grad_kernel = pytest.importorskip("liveweight.kernels.masked_linear_grad")
bits = pytest.importorskip("liveweight.kernels.mask_bits")
tiles = pytest.importorskip("liveweight.kernels.tiles")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative to the largest output. Sums are float32 on both sides; what remains is one rounding to
# the dtype, which the interpreter does for bfloat16 by cutting off (a whole 2**-7). float32: three
# TF32 products on a GPU, and two orders of summing up to 4096 terms.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# The interpreter's own; it says nothing about the kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
SMALL = tiles.Tile(16, 32, 32, warps=4, stages=2)
TILES = {
    "small": SMALL,
    "two words": tiles.Tile(32, 64, 64, warps=4, stages=3),
    "four parts": tiles.Tile(16, 32, 32, warps=4, stages=2, split=4),
    "descriptors": tiles.Tile(16, 32, 32, warps=4, stages=2, tma=True),
    "picked": None,
}
SIZES = [(1, 1, 1), (17, 33, 63), (33, 17, 64), (5, 40, 129), (16, 32, 64)]


def case(M, N, K, dtype, device, keep=0.3, bias=True):
    x = torch.randn(M, K, device=device).to(dtype)
    weight = torch.randn(N, K, device=device).to(dtype)
    mask = torch.rand(N, K, device=device) < keep
    b = torch.randn(N, device=device).to(dtype) if bias else None
    return x, weight, ops.pack_mask_bits(mask), b


def assert_close(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.numel():
        scale = want.double().abs().max().clamp(min=1)
        error = (got.double() - want.double()).abs().max() / scale
        assert error <= TOLERANCE[got.dtype], f"error {error:.2e}"


def assert_matches(got, operands):
    assert_close(got, reference.masked_linear(*operands))


def assert_gradients_match(operands, tile=None, weight_tile=None):
    x, weight, mask_bits, _ = operands
    grad = torch.randn(x.shape[0], weight.shape[0], device=x.device).to(x.dtype)
    got = kernel.launch_grad_x(grad, weight, mask_bits, tile)
    assert_close(got, reference.masked_linear_grad_x(grad, weight, mask_bits))
    got = grad_kernel.launch_grad_weight(grad, x, mask_bits, weight_tile or tile)
    assert_close(got, reference.masked_linear_grad_weight(grad, x, mask_bits))
    assert (got[~reference.unpack_mask_bits(mask_bits, x.shape[1])] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES.values(), ids=list(TILES))
def test_ragged_sizes_equal_the_reference(device, dtype, tile):
    for size in SIZES:
        operands = case(*size, dtype, device)
        assert_matches(kernel.launch(*operands, tile), operands)
        assert_gradients_match(operands, tile)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty_sizes(device, shape):
    operands = case(*shape, torch.float32, device)
    assert_matches(kernel.launch(*operands), operands)
    assert_gradients_match(operands)


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_nothing_kept_and_all_kept(device, keep):
    operands = case(20, 40, 70, torch.float32, device, keep=keep, bias=keep > 0)
    assert_matches(kernel.launch(*operands, SMALL), operands)
    assert_gradients_match(operands, SMALL)


@pytest.mark.parametrize("size", [(1, 1), (7, 31), (5, 32), (9, 33), (40, 200), (3, 0), (0, 3)])
def test_masks_are_packed_as_the_reference_does(device, size):
    for keep in (0.0, 0.5, 1.0):
        mask = torch.rand(size, device=device) < keep
        assert torch.equal(bits.pack(mask), reference.pack_mask_bits(mask))


def test_packing_refuses_what_it_would_misread(device):
    with pytest.raises(TypeError, match="expected mask bool, got uint8"):
        bits.pack(torch.ones(2, 3, dtype=torch.uint8, device=device))
    with pytest.raises(ValueError, match="expected mask contiguous"):
        bits.pack(torch.ones(3, 2, dtype=torch.bool, device=device).t())


def tiled_mask(N, K, device):
    """Return a mask whose 32 x 32 tiles are full, mixed and empty in turn."""
    mask = torch.rand(N, K, device=device) < 0.5
    row = torch.arange(N, device=device)[:, None] // 32
    kind = (row + torch.arange(K, device=device)[None, :] // 32) % 3
    return (mask & (kind == 1)) | (kind == 2)


@pytest.mark.parametrize(("N", "K"), [(70, 135), (96, 160)])
def test_lists_name_every_tile_once_by_what_it_keeps(device, N, K):
    mask = tiled_mask(N, K, device)
    mask[-3, -2] = True  # the last tile, ragged or not, is full or mixed by its own columns alone
    kinds = {}
    for turned in (False, True):
        lists, counts = bits.list_tiles(ops.pack_mask_bits(mask), K, 32, 32, turned)
        kinds[turned] = {}
        for panel, (full, mixed) in enumerate(counts.tolist()):
            for kind, count in enumerate((full, mixed)):
                steps = lists[panel, kind, :count].tolist()
                assert steps == sorted(set(steps))
                for step in steps:
                    kinds[turned][(step, panel) if turned else (panel, step)] = kind
    want = {}
    for i in range(-(-N // 32)):
        for j in range(-(-K // 32)):
            tile = mask[32 * i : 32 * i + 32, 32 * j : 32 * j + 32]
            if tile.any():
                want[i, j] = 0 if tile.all() else 1
    assert kinds[False] == want and kinds[True] == want and set(want.values()) == {0, 1}


@pytest.mark.parametrize("tile", [SMALL, TILES["four parts"], TILES["descriptors"]])
def test_full_mixed_and_empty_tiles_are_each_treated_as_what_they_are(device, tile):
    N, K = 100, 168
    x, weight, _, bias = case(18, N, K, torch.float32, device)
    mask = tiled_mask(N, K, device)
    mask[32:64, 64:] = False
    weight = weight.masked_fill(~mask, float("nan"))  # never used, whatever it holds
    packed = ops.pack_mask_bits(mask)
    got = kernel.launch(x, weight, packed, bias, tile)
    assert not got.isnan().any()
    assert_matches(got, (x, weight, packed, bias))
    assert_gradients_match((x, weight, packed, bias), tile)


@pytest.mark.parametrize("seed", range(20))
def test_any_size_and_any_mask_of_tiles(device, seed):
    pick = random.Random(seed)
    M, N, K = pick.randint(1, 40), pick.randint(1, 70), pick.randint(1, 140)
    x, weight, _, bias = case(M, N, K, pick.choice(DTYPES), device)
    tile = pick.choice([tile for tile in TILES.values() if tile is not None])
    # Of tiles of 32 x 32: empty, mixed and full.
    coarse = torch.tensor(pick.choices([0.0, 0.5, 1.0], k=15), device=device).view(3, 5)
    keep = coarse.repeat_interleave(32, 0)[:N].repeat_interleave(32, 1)[:, :K]
    mask = torch.rand(N, K, device=device) < keep
    weight = weight.masked_fill(~mask, float("nan"))
    operands = (x, weight, ops.pack_mask_bits(mask), bias)
    assert_matches(kernel.launch(*operands, tile), operands)
    assert_gradients_match(operands, tile)


def test_empty_tiles_are_not_read(device):
    M, N, K = 16, 64, 96
    x, weight, _, _ = case(M, N, K, torch.float32, device)
    grad = torch.randn(M, N, device=device)
    mask = torch.rand(N, K, device=device) < 0.5
    mask[:, 32:64] = False  # columns of x and of the weight that nothing needs
    packed = ops.pack_mask_bits(mask)
    unread = x.clone()
    unread[:, 32:64] = float("nan")
    assert torch.equal(
        kernel.launch(unread, weight, packed, None, SMALL),
        kernel.launch(x, weight, packed, None, SMALL),
    )
    got = grad_kernel.launch_grad_weight(grad, unread, packed, tiles.Tile(32, 32, 16, 4, 2))
    assert_close(got, reference.masked_linear_grad_weight(grad, x, packed))
    mask = torch.rand(N, K, device=device) < 0.5
    mask[32:] = False
    packed = ops.pack_mask_bits(mask)
    unread = grad.clone()
    unread[:, 32:] = float("nan")
    got = kernel.launch_grad_x(unread, weight, packed, SMALL)
    assert_close(got, reference.masked_linear_grad_x(grad, weight, packed))


@pytest.mark.parametrize(("N", "K"), [(40, 293), (293, 40)])
def test_more_tiles_than_one_listing_step(device, monkeypatch, N, K):
    monkeypatch.setattr(bits, "_WORDS_A_STEP", 128)  # 4 tiles of 32 rows and a word
    x, weight, _, bias = case(3, N, K, torch.float32, device)
    mask = tiled_mask(N, K, device)
    operands = (x, weight, ops.pack_mask_bits(mask), bias)
    assert_matches(kernel.launch(*operands, SMALL), operands)
    assert_gradients_match(operands, SMALL)


def test_second_derivatives_through_the_kernels(device, monkeypatch):
    module = importlib.import_module("liveweight.ops.masked_linear")
    if device.type == "cpu":  # on a GPU the ops are the kernels
        monkeypatch.setattr(module, "_op", kernel.launch)
        monkeypatch.setattr(module, "_op_x", kernel.launch_grad_x)
        monkeypatch.setattr(module, "_op_weight", grad_kernel.launch_grad_weight)
    x, weight, packed, bias = case(9, 40, 70, torch.float32, device)
    mask = ops.unpack_mask_bits(packed, 70)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def second(y):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)

    got = second(ops.masked_linear(x, weight, packed, bias))
    want = second(torch.nn.functional.linear(x, weight * mask, bias))
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() <= 1e-4 * w.abs().max()  # three products one after another


def test_many_tiles_are_each_computed_once(device):
    # More tiles of M, or rows of tiles of the weight, than one group; ragged in both directions.
    operands = case(16 * 9 + 3, 32 + 1, 40, torch.float32, device)
    assert_matches(kernel.launch(*operands, SMALL), operands)
    operands = case(5, 16 * 9 + 3, 40, torch.float32, device)
    assert_gradients_match(operands, SMALL)


def test_launch_refuses_what_its_addresses_would_leave(device):
    x, weight, packed, bias = case(4, 6, 64, torch.float32, device)
    grad = torch.randn(4, 6, device=device)
    with pytest.raises(ValueError, match="masked_linear: expected weight contiguous"):
        kernel.launch(x, weight.t().contiguous().t(), packed, bias)
    with pytest.raises(ValueError, match=r"mask_bits contiguous \(6, 2\)"):
        kernel.launch(x, weight, packed[:, :1].contiguous(), bias)
    with pytest.raises(ValueError, match=r"bias contiguous \(6,\)"):
        kernel.launch(x, weight, packed, bias[:5])
    with pytest.raises(TypeError, match="float16"):
        kernel.launch(x, weight.half(), packed, bias)
    with pytest.raises(
        ValueError, match=r"masked_linear_grad_x: expected grad contiguous \(4, 6\)"
    ):
        kernel.launch_grad_x(grad[:, :5].contiguous(), weight, packed)
    with pytest.raises(TypeError, match="expected mask_bits int32, got int64"):
        kernel.launch_grad_x(grad, weight, packed.long())
    with pytest.raises(ValueError, match=r"grad_weight: expected grad contiguous \(4, 6\)"):
        grad_kernel.launch_grad_weight(grad[:3], x, packed)
    with pytest.raises(TypeError, match="expected x bfloat16, float16, float32, got float64"):
        grad_kernel.launch_grad_weight(grad.double(), x.double(), packed)
