"""mass_mask and top_k_mask in CUDA C++: their masks, on the emulator and on a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from liveweight import reference

SHAPES = [(1, 1), (7, 2), (3, 31), (5, 64), (2, 129), (3, 1000), (1, 4097), (0, 5), (4, 0)]
LONG = [(1, 14336), (2, 20001)]  # the second does not fit shared memory
ALPHAS = [0.0, 0.3, 0.9, 0.95, 1.0]
TIES = [False, True]


def place(kernels, scores: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Return scores on the device, `offset` elements after a 16-byte boundary, in exact storage."""
    storage = torch.empty(scores.numel() + offset, dtype=scores.dtype, device=kernels.device)
    return storage[offset:].view(scores.shape).copy_(scores)


def draw(shape: tuple[int, int], top: int | None, seed: int) -> torch.Tensor:
    """Return whole numbers below top, whose sums are exact in any order; floats for top None."""
    generator = torch.Generator().manual_seed(seed)
    if top is not None:
        return torch.randint(0, top, shape, generator=generator).float()
    return torch.randn(shape, generator=generator).abs() * torch.rand(shape, generator=generator)


def check_mass(kernels, scores, alpha, authors, offset=0) -> None:
    want = reference.mass_mask(scores, alpha, authors)
    moved = place(kernels, scores, offset)
    mask = kernels.op("mass_mask")(moved, alpha, authors, False)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.cpu(), want)
    bits = kernels.op("mass_mask")(moved, alpha, authors, True)
    assert torch.equal(bits.cpu(), reference.pack_mask_bits(want))


def check_top(kernels, scores, k, per_row, sizes=None, offset=0) -> None:
    want = reference.top_k_mask(scores, k, per_row, sizes, False)
    moved = place(kernels, scores, offset)
    sizes = None if sizes is None else sizes.to(kernels.device)
    mask = kernels.op("top_k_mask")(moved, k, per_row, sizes, False)
    assert torch.equal(mask.cpu(), want)
    bits = kernels.op("top_k_mask")(moved, k, per_row, sizes, True)
    assert torch.equal(bits.cpu(), reference.pack_mask_bits(want))


@pytest.mark.parametrize("authors", TIES)
def test_mass_mask_equals_the_reference_in_every_order(kernels, authors):
    for seed, shape in enumerate(SHAPES):
        for top in (2, 50, 2**15, None):
            for _ in kernels.orders(seed):
                alpha = ALPHAS[seed % len(ALPHAS)]
                check_mass(kernels, draw(shape, top, seed), alpha, authors, offset=seed % 2)


@pytest.mark.parametrize("authors", TIES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_mass_mask_at_every_alpha(kernels, alpha, authors):
    for shape in [(2, 63), (2, 640)]:
        for top in (1, 3, 2**15, None):
            check_mass(kernels, draw(shape, top, 5), alpha, authors)


@pytest.mark.parametrize("authors", TIES)
def test_mass_mask_of_long_rows(kernels, authors):
    for shape in LONG if kernels.emulated else [*LONG, (300, 14336), (3, 1 << 20)]:
        for top in (4, None):
            check_mass(kernels, draw(shape, top, 7), 0.9, authors)


def test_mass_mask_adds_offsets_beyond_32_bits(kernels):
    # Nearly all scores share one wide bucket, and their offsets in it sum to more than 2**32.
    for columns in (6000, 20001):
        scores = 1.2 + 0.04 * draw((1, columns), None, 3).clamp(max=1)
        scores[0, :2] = torch.tensor([1e-38, 1e38])
        check_mass(kernels, scores, 1 - 1e-40, False)
        scores[0, 1] = 2**-126
        scores[0, 2] = 1e4
        for alpha in (0.2, 0.7):
            check_mass(kernels, scores, alpha, False)


def test_mass_mask_of_very_small_large_and_negative_zero_scores(kernels):
    for scale in (1e-45, 1e-40, 1e38):
        check_mass(kernels, torch.tensor([[3.0, 1.0, 2.0]]) * scale, 0.5, False)
    for row in ([3e38] * 4 + [1e38, 2e38], [3e38, 2e38, 1e38, 1.0], [3.4028234e38, 1e31, 1.0]):
        for alpha in (0.0, 0.2, 0.9, 1.0):
            check_mass(kernels, torch.tensor([row]), alpha, True)
    zeros = torch.tensor([[-0.0, 1.0, 0.0], [-0.0, -0.0, -0.0]])
    for alpha in (0.5, 1.0):
        for authors in TIES:
            check_mass(kernels, zeros, alpha, authors)


@pytest.mark.parametrize("bad", [-1.0, -1e-45, float("nan"), float("inf"), -float("inf")])
def test_mass_mask_names_the_first_row_with_a_bad_score(kernels, bad):
    scores = draw((9, 70), None, 1)
    scores[5:, 7] = bad
    for alpha in (0.0, 0.9, 1.0):
        for _ in kernels.orders():
            with pytest.raises(ValueError, match="be finite and >= 0, row 5 holds a negative, NaN"):
                kernels.op("mass_mask")(scores.to(kernels.device), alpha, False, False)


@pytest.mark.parametrize("per_row", [True, False])
def test_top_k_mask_equals_the_reference_in_every_order(kernels, per_row):
    for seed, shape in enumerate(SHAPES):
        count = shape[1] if per_row else shape[0] * shape[1]
        for top in (1, 5, None):
            scores = draw(shape, top, seed) - 1
            for k in {0, 1, count // 3, count, count + 5}:
                order = ["forward", "reverse", "random"][k % 3]
                for now in kernels.orders(seed):
                    if now in (order, "gpu"):
                        check_top(kernels, scores, k, per_row, offset=seed % 2)


def test_top_k_mask_of_many_scores(kernels):
    shape = (3, 20001) if kernels.emulated else (300, 20001)
    for top in (4, None):
        scores = draw(shape, top, 7)
        check_top(kernels, scores, 7777, True)
        check_top(kernels, scores, scores.numel() // 3, False)


def test_top_k_mask_orders_all_numbers(kernels):
    tiny = 1e-45
    scores = torch.tensor([[float("inf"), 3.0, -0.0, 0.0, tiny, -tiny, -2.0, -float("inf")]])
    for k in range(9):
        check_top(kernels, scores, k, True)
        check_top(kernels, scores.flip(1), k, True)
        check_top(kernels, scores.repeat(2, 1), k, False)
        check_top(kernels, scores.double().repeat(2, 1) * 1e200, k, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_top_k_mask_with_sizes(kernels, dtype):
    generator = torch.Generator().manual_seed(2)
    for shape in [(1, 50), (4, 33), (3, 2000)]:
        for most in (2, 9):
            sizes = torch.randint(-1, most, shape, generator=generator)
            scores = draw(shape, 3 if most == 9 else 1000, most).to(dtype)
            total = int(sizes.clamp(min=0).sum())
            for k in (0, 1, total // 2, total - 1, total, total + 1):
                check_top(kernels, scores, k, False, sizes)


def test_top_k_mask_of_float64_tells_neighbours_apart(kernels):
    scores = torch.full((2, 40), 1.0, dtype=torch.float64)
    scores[1, 3] += 2.0**-52
    scores[0, 9] -= 2.0**-53
    for k in (1, 2, 79):
        check_top(kernels, scores, k, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_top_k_mask_refuses_nan(kernels, dtype):
    for sign in (1, -1):
        scores = draw((6, 70), None, 1).to(dtype)
        scores[4:, 7] = sign * float("nan")
        for per_row in (True, False) if dtype == torch.float32 else (False,):
            with pytest.raises(ValueError, match="scores must not be NaN, row 4 holds one"):
                kernels.op("top_k_mask")(scores.to(kernels.device), 3, per_row, None, False)


def check_signal(kernels, weight, activity, bias, alpha, authors=False, offset=0) -> None:
    moved = [None if t is None else place(kernels, t, offset) for t in (weight, activity, bias)]
    for packed in (False, True):
        want = reference.signal_mask(weight, activity, bias, alpha, authors, packed)
        got = kernels.op("signal_mask")(*moved, alpha, authors, packed)
        for mine, other in zip(got, want, strict=True):
            assert mine.dtype == other.dtype
            assert torch.equal(mine.cpu(), other)


def draw_layer(rows: int, inputs: int, dtype: torch.dtype, seed: int = 0):
    """Return weight, activity and bias that are products of few bits, or any numbers in float32."""
    generator = torch.Generator().manual_seed(rows * 31 + inputs + seed)
    weight = torch.randn(rows, inputs, generator=generator).to(dtype)
    activity = torch.rand(inputs, generator=generator)
    return weight, activity, torch.randn(rows, generator=generator).to(dtype)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_signal_mask_equals_the_reference(kernels, dtype):
    for seed, (rows, inputs) in enumerate([(1, 1), (3, 31), (2, 64), (5, 200), (2, 1027), (3, 0)]):
        weight, activity, bias = draw_layer(rows, inputs, dtype)
        for offset in (0, 1):
            for _ in kernels.orders(seed):
                check_signal(kernels, weight, activity, bias, 0.9, offset == 1, offset)
                check_signal(kernels, weight, activity, None, 0.5, offset == 0, offset)
    weight, activity, bias = draw_layer(0, 5, dtype)
    check_signal(kernels, weight, activity, bias, 0.9)


def test_signal_mask_of_long_rows_and_every_alpha(kernels):
    weight, activity, bias = draw_layer(1, 20000, torch.bfloat16)
    check_signal(kernels, weight, activity, bias, 0.95)
    weight, activity, bias = draw_layer(4, 96, torch.float16)
    weight[1], bias[1], bias[2] = 0, 0, 1000
    for alpha in ALPHAS:
        for authors in TIES:
            check_signal(kernels, weight, activity, bias, alpha, authors)


def test_signal_mask_names_the_row_of_a_bad_product(kernels):
    call, device = kernels.op("signal_mask"), kernels.device
    for place_bad in ("weight", "bias", "activity"):
        weight, activity, bias = draw_layer(6, 40, torch.float32)
        if place_bad == "weight":
            weight[3, 5] = float("inf")
        elif place_bad == "bias":
            bias[3] = float("nan")
        else:
            activity[2], weight[:3, 2] = -1.0, 0
        with pytest.raises(ValueError, match="signal_mask: .weight. . activity must .*, row 3 "):
            call(weight.to(device), activity.to(device), bias.to(device), 0.9, False, False)


def test_select_launchers_refuse_what_they_cannot_take(kernels):
    mass, top = kernels.op("mass_mask"), kernels.op("top_k_mask")
    scores = torch.zeros(3, 4, device=kernels.device)
    with pytest.raises(RuntimeError, match="mass_mask: scores must be Float, got Double"):
        mass(scores.double(), 0.5, False, False)
    with pytest.raises(RuntimeError, match="mass_mask: scores must be contiguous"):
        mass(scores.t(), 0.5, False, False)
    with pytest.raises(RuntimeError, match=r"alpha must be in \[0, 1\], got 1.5"):
        mass(scores, 1.5, False, False)
    signal, weight = kernels.op("signal_mask"), scores.half()
    with pytest.raises(RuntimeError, match=r"activity must have shape \[4\], got \[3\]"):
        signal(weight, scores[:, 0].contiguous(), None, 0.5, False, False)
    with pytest.raises(RuntimeError, match="bias must be Half, got Float"):
        signal(weight, scores[0], scores[:, 0].contiguous(), 0.5, False, False)
    with pytest.raises(RuntimeError, match="top_k_mask: k must be >= 0, got -1"):
        top(scores, -1, True, None, False)
    with pytest.raises(RuntimeError, match="sizes go with one k for all rows"):
        top(scores, 1, True, torch.ones(3, 4, dtype=torch.int64, device=kernels.device), False)
    with pytest.raises(RuntimeError, match=r"sizes must have shape \[3, 4\], got \[4\]"):
        top(scores, 1, False, torch.ones(4, dtype=torch.int64, device=kernels.device), False)


@pytest.mark.sanitized
def test_select_touches_nothing_but_its_tensors(kernels):
    for offset, shape in enumerate([(1, 1), (3, 63), (2, 640), (3, 1001)]):
        for _ in kernels.orders(offset):
            check_mass(kernels, draw(shape, 9, offset), 0.7, False, offset)
            check_mass(kernels, draw(shape, None, offset), 0.7, True, offset)
            check_top(kernels, draw(shape, 9, offset), shape[1] // 2, True, None, offset)
        check_top(kernels, draw(shape, 9, offset), shape[1] // 2, False, None, offset)
    check_mass(kernels, draw((1, 20001), None, 1), 0.7, False, 1)


def test_select_needs_every_barrier(kernels):
    equal, few = draw((2, 700), 4, 3), draw((2, 700), None, 3)
    many = draw((1, 40000), 4, 3)

    def check():
        check_mass(kernels, equal, 0.75, False)
        check_mass(kernels, few, 0.9, False)
        check_mass(kernels, few, 0.9, True)
        check_top(kernels, many, 18000, False)
        check_top(kernels, many, 28000, False)

    files = ("select_block.cuh", "select_rows.cuh", "select_flat.cuh")
    kernels.assert_every_barrier_is_needed(check, *files)


@pytest.mark.gpu
def test_selection_runs_in_a_cuda_graph(gpu):
    ops = torch.ops.liveweight
    scores = torch.rand(64, 3000, device=gpu)
    runs = [
        lambda: ops.mass_mask(scores, 0.9, False, True),
        lambda: ops.top_k_mask(scores, 1000, True, None, False),
        lambda: ops.top_k_mask(scores, 50000, False, None, True),
    ]
    want = [run() for run in runs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [run() for run in runs]
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


BAD_REPLAY = """
import torch, liveweight
scores = torch.rand(8, 100, device="cuda")
torch.ops.liveweight.mass_mask(scores, 0.9, False, False)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    torch.ops.liveweight.mass_mask(scores, 0.9, False, False)
graph.replay()
torch.cuda.synchronize()
print("good scores passed")
scores[3, 5] = -1.0
graph.replay()
torch.cuda.synchronize()
print("bad scores passed")
"""


@pytest.mark.gpu
def test_a_captured_selection_stops_at_bad_scores(gpu):
    # A process of its own: the device-side assertion ends its use of the GPU.
    done = subprocess.run([sys.executable, "-c", BAD_REPLAY], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["good scores passed"]
    assert "device-side assert" in done.stderr
