"""patch_gram in CUDA C++: its values, on the emulator and on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from liveweight import reference

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# At most 256 terms are added in float32 before they are passed on; a few more additions follow.
TOLERANCE = 300 * 2.0**-24


@dataclasses.dataclass(frozen=True)
class Case:
    """x [n, c, h, w] and the window; padding is (top, bottom, left, right)."""

    x: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    layout: str = "contiguous"

    def tensor(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(self.x))
        x = torch.randn(self.x, generator=generator).to(dtype)
        if self.layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if self.layout == "sliced":  # no stride is 1, and storage goes on after the last pixel
            wide = x.new_full((*x.shape, 2), torch.nan)
            wide[..., 0] = x
            return wide[..., 0]
        return x

    def window(self) -> tuple:
        return list(self.kernel), list(self.stride), list(self.padding), list(self.dilation)


LAGS = [
    Case((2, 3, 7, 5), (3, 3), padding=(1, 1, 1, 1)),
    Case((1, 33, 4, 4), (3, 3), padding=(1, 1, 1, 1)),
    Case((2, 2, 14, 13), (3, 3)),
    Case((1, 2, 1, 1), (3, 3), padding=(1, 1, 1, 1)),
    Case((1, 2, 1, 2), (3, 3), padding=(1, 2, 0, 1)),
    Case((1, 2, 3, 3), (3, 3)),
    Case((1, 1, 40, 37), (3, 3), padding=(0, 2, 3, 1)),
    Case((1, 1, 101, 6), (3, 3), padding=(2, 2, 2, 2)),
    Case((1, 5, 6, 70), (3, 3), padding=(1, 1, 1, 1), layout="channels_last"),
]
TILES = [
    Case((2, 3, 9, 8), (1, 1)),
    Case((1, 40, 9, 8), (1, 1), stride=(2, 2)),
    Case((2, 3, 9, 8), (3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
    Case((1, 2, 20, 23), (3, 3), padding=(3, 3, 3, 3), dilation=(3, 3)),
    Case((2, 2, 9, 8), (2, 5), stride=(1, 2), padding=(1, 1, 0, 0)),
    Case((1, 3, 14, 12), (5, 5)),
    Case((1, 2, 23, 23), (7, 7), stride=(2, 2), padding=(3, 3, 3, 3)),
    Case((1, 1, 30, 31), (11, 11), stride=(4, 4), padding=(2, 2, 2, 2)),
    Case((1, 1, 60, 60), (3, 3), stride=(1, 1), padding=(18, 18, 18, 18), dilation=(18, 18)),
    Case((2, 1, 3, 50), (1, 3), padding=(0, 0, 1, 1)),
    Case((1, 2, 9, 9), (2, 2), stride=(4, 3)),
    Case((1, 6, 10, 9), (3, 3), stride=(2, 1), padding=(1, 1, 1, 1), layout="channels_last"),
]
# So many blocks that each takes several strips or tiles.
LONG = [Case((1, 8448, 2, 17), (3, 3), padding=(1, 1, 1, 1)), Case((1, 1, 40, 130), (1, 128))]
LARGE = [
    Case((16, 64, 56, 56), (3, 3), padding=(1, 1, 1, 1)),
    Case((8, 256, 28, 28), (3, 3), padding=(1, 1, 1, 1), layout="channels_last"),
    Case((8, 3, 224, 224), (7, 7), stride=(2, 2), padding=(3, 3, 3, 3)),
]


def run(kernels, case: Case, x: torch.Tensor) -> torch.Tensor:
    moved = x.to(kernels.device)
    if x.stride() != moved.stride():
        moved = torch.empty_strided(
            x.shape, x.stride(), dtype=x.dtype, device=kernels.device
        ).copy_(x)
    return kernels.op("patch_gram")(moved, *case.window()).cpu()


def expected(case: Case, x: torch.Tensor) -> torch.Tensor:
    return reference.patch_gram(x.double(), *case.window())


def assert_matches(case: Case, got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), want, rtol=TOLERANCE, atol=0, msg=lambda text: f"{case}: {text}"
    )


@pytest.mark.parametrize("case", LAGS + TILES + LONG, ids=str)
def test_patch_gram_equals_the_reference_in_every_order(kernels, case):
    x = case.tensor()
    want = expected(case, x)
    for _ in kernels.orders():
        assert_matches(case, run(kernels, case, x), want)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_patch_gram_of_large_maps(gpu, case):
    x = case.tensor()
    got = torch.ops.liveweight.patch_gram(x.to(gpu), *case.window())
    assert_matches(case, got.cpu(), expected(case, x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("which", [LAGS[0], TILES[2], TILES[5]], ids=str)
def test_patch_gram_reads_every_dtype_and_layout(kernels, which, dtype, layout):
    case = dataclasses.replace(which, layout=layout)
    x = case.tensor(dtype)
    assert_matches(case, run(kernels, case, x), expected(case, x))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", [*LAGS[:5], *TILES[:5], TILES[-1]], ids=str)
def test_patch_gram_reads_nothing_but_its_input(kernels, case, dtype):
    x = case.tensor(dtype)
    assert_matches(case, run(kernels, case, x), expected(case, x))


@pytest.mark.parametrize(
    ("case", "files"),
    [
        (Case((1, 2, 15, 14), (3, 3)), ["patch_gram_lags.cuh", "patch_gram_stage.cuh"]),
        (Case((1, 70, 9, 8), (2, 3), (2, 2)), ["patch_gram_tiles.cuh", "patch_gram_stage.cuh"]),
    ],
)
def test_patch_gram_needs_every_barrier(kernels, case, files):
    x = case.tensor()
    want = expected(case, x)
    kernels.assert_every_barrier_is_needed(
        lambda: assert_matches(case, run(kernels, case, x), want), *files
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", [LAGS[0], TILES[2]], ids=str)
def test_patch_gram_shows_what_is_not_finite_where_it_is(kernels, case, value):
    x = case.tensor()
    clean = expected(case, x)
    x[1, 2, 3, 2] = value
    got = run(kernels, case, x).double()
    assert not got[1, 2].isfinite().all()
    got[1, 2] = clean[1, 2]
    assert_matches(case, got.float(), clean)


def test_patch_gram_keeps_its_accuracy_where_all_mass_is_on_the_border(kernels):
    x = torch.full((1, 4, 9, 10), 1e-4)
    x[:, 0, 0], x[:, 1, -1], x[:, 2, :, 0], x[:, 3, :, -1] = 1e4, 1e4, 1e4, 1e4
    for padding in ((1, 1, 1, 1), (0, 0, 0, 0), (2, 2, 2, 2)):
        case = Case((1, 4, 9, 10), (3, 3), padding=padding)
        assert_matches(case, run(kernels, case, x), expected(case, x))


def test_patch_gram_does_not_drift(kernels):
    # Equal terms round alike, so that errors add up where they can.
    for kernel, stride in (((3, 3), (1, 1)), ((2, 2), (2, 2))):
        case = Case((1, 1, 150, 64), kernel, stride)
        x = torch.full(case.x, 0.1)
        assert_matches(case, run(kernels, case, x), expected(case, x))


def test_patch_gram_of_nothing(kernels):
    for shape in ((0, 3, 5, 5), (2, 0, 5, 5)):
        got = run(kernels, Case(shape, (3, 3)), torch.empty(shape))
        assert got.shape == (*shape[:2], 45)


def test_patch_gram_refuses_what_does_not_fit(kernels):
    x = torch.randn(1, 2, 5, 6, device=kernels.device)
    op, one, none = kernels.op("patch_gram"), [1, 1], [0, 0, 0, 0]
    with pytest.raises(RuntimeError, match="patch_gram: a window of 7 with dilation 1 does not"):
        op(x, [7, 3], one, none, one)
    with pytest.raises(RuntimeError, match="must have at most 128 taps, got 12 x 12"):
        op(x, [12, 12], one, none, one)
    with pytest.raises(RuntimeError, match="patch_gram: x must be Float or BFloat16 or Half"):
        op(x.double(), [3, 3], one, none, one)
    with pytest.raises(RuntimeError, match="must be >= 1, got 3, 0 and 1"):
        op(x, [3, 3], [0, 1], none, one)
    with pytest.raises(RuntimeError, match=r"patch_gram: x must be \[N, C, H, W\]"):
        op(x[0], [3, 3], one, none, one)


@pytest.mark.gpu
def test_patch_gram_repeats_to_the_bit_and_runs_in_a_cuda_graph(gpu):
    x = torch.randn(2, 3, 224, 224, device=gpu)
    for case in (Case((2, 3, 224, 224), (3, 3)), Case((2, 3, 224, 224), (7, 7), (2, 2))):
        first = torch.ops.liveweight.patch_gram(x, *case.window())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            second = torch.ops.liveweight.patch_gram(x, *case.window())
        graph.replay()
        assert torch.equal(first, second)
