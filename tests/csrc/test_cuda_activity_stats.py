"""activity_stats_ in CUDA C++: its values, on the emulator and on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from liveweight import reference

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# At most 32 terms are added in float32 before each flush to float64: 32 * 2**-24.
TOLERANCE = 32 * 2.0**-24


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: x [rows, features, run], `offset` elements after a 16-byte boundary."""

    rows: int
    features: int
    run: int
    dtype: torch.dtype = torch.float32
    offset: int = 0
    eps: float = 0.1
    nan_at: int | None = None

    def x(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.rows * 31 + self.features * 7 + self.run)
        size = (self.rows, self.features, self.run)
        x = torch.randn(size, generator=generator).to(self.dtype)
        if self.nan_at is not None:
            x.view(-1)[self.nan_at] = float("nan")
        return x


def run(kernels, case: Case, one_split: bool = False) -> torch.Tensor:
    """Return stats [4, F] of one call."""
    x = case.x()
    # Not a byte longer than the data, so that AddressSanitizer sees every access past its end.
    storage = torch.empty(x.numel() + case.offset, dtype=x.dtype, device=kernels.device)
    moved = storage[case.offset :].view(x.shape).copy_(x)
    stats = torch.zeros(4, case.features, dtype=torch.float64, device=kernels.device)
    if one_split:
        kernels.probe("activity_stats_one_split")(stats, moved, case.eps)
    else:
        kernels.op("activity_stats_")(stats, moved, case.eps)
    return stats.cpu()


def expected(case: Case) -> torch.Tensor:
    stats = torch.zeros(4, case.features, dtype=torch.float64)
    reference.activity_stats_(stats, case.x(), case.eps)
    return stats


def assert_matches(case: Case, got: torch.Tensor, want: torch.Tensor | None = None) -> None:
    want = expected(case) if want is None else want
    assert torch.equal(got[2], want[2]), f"{case}: counts differ"
    assert torch.equal(got[3].isnan(), want[3].isnan()), f"{case}: NaN hidden"
    assert torch.equal(got[3].nan_to_num(), want[3].nan_to_num()), f"{case}: maxima differ"
    torch.testing.assert_close(
        got[:2], want[:2], rtol=TOLERANCE, atol=0, equal_nan=True, msg=lambda m: f"{case}: {m}"
    )


COLUMNS = [(1, 1), (1, 17), (2, 8), (63, 129), (130, 64), (300, 40), (1000, 3), (5000, 8)]
RUNS = [(1, 1, 64), (3, 2, 49), (2, 9, 196), (1, 3, 2500), (5, 33, 65), (20, 3, 1500), (9, 2, 2001)]
FOLDED = [(7, 5, 2), (33, 17, 4), (64, 3, 9), (3, 12, 15)]
SHAPES = [(n, f, 1) for n, f in [*COLUMNS, (40, 513)]] + RUNS + FOLDED
LARGE = [(4099, 1024, 1), (16, 64, 3136), (1, 3, 300000)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_activity_stats_equals_the_reference_in_every_order(kernels, dtype):
    for seed, shape in enumerate(SHAPES if kernels.emulated else SHAPES + LARGE):
        for offset in (0, 1):
            case = Case(*shape, dtype, offset=offset)
            want = expected(case)
            for _ in kernels.orders(seed):
                assert_matches(case, run(kernels, case), want)


def test_activity_stats_flushes_long_sums(kernels):
    # 29 + 28 + 3 rows per thread and the like: more than one float32 window, and a remainder.
    for shape in [(8 * 60, 256, 1), (8 * 61 + 3, 33, 1), (30, 9, 196), (40, 1, 3001)]:
        for dtype in TYPES:
            case = Case(*shape, dtype)
            assert_matches(case, run(kernels, case, one_split=True))


def test_activity_stats_shows_nan_wherever_it_stands(kernels):
    for shape in [(40, 16, 1), (3, 4, 50), (3, 2, 64), (9, 3, 2)]:
        for dtype in TYPES:
            for at in (0, -1, shape[0] * shape[1] * shape[2] // 2):
                case = Case(*shape, dtype, nan_at=at)
                got = run(kernels, case)
                assert_matches(case, got)
                assert got[0].isnan().sum() == 1


def test_activity_stats_compares_with_eps_as_float64_does(kernels):
    # 0.3 and 0.7 are no float32: one is rounded up, the other down. Both neighbours are in x.
    class Near(Case):
        def x(self):
            middle = torch.tensor(self.eps, dtype=torch.float32)
            steps = [torch.nextafter(middle, torch.tensor(to)) for to in (0.0, 1.0)]
            return torch.stack([steps[0], middle, steps[1]]).reshape(3, 1, 1)

    counts = set()
    for case in (Near(3, 1, 1, eps=0.3), Near(3, 1, 1, eps=0.7)):
        got = run(kernels, case)
        assert_matches(case, got)
        counts.add(int(got[2, 0]))
    assert counts == {1, 2}
    case = Case(257, 8, 1, eps=1e-50)
    assert_matches(case, run(kernels, case))


# (3, ...) takes one launch, (300, ...) two; runs are long and short.
TURNED = [(3, 12, 1, 4), (300, 21, 1, 3), (2, 6, 64, 2), (3000, 6, 64, 3), (9, 6, 2, 2)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", TURNED, ids=str)
def test_activity_stats_are_added_and_turned(kernels, shape, dtype):
    case, channels = Case(*shape[:3], dtype), shape[3]
    before = torch.rand(4, case.features, dtype=torch.float64)
    before[3, 0] = 1e3
    for turned in (0, channels):
        want = before.clone()
        reference.activity_stats_(want, case.x(), case.eps, turned)
        for _ in kernels.orders():
            stats = before.to(kernels.device, copy=True)
            kernels.op("activity_stats_")(stats, case.x().to(kernels.device), case.eps, turned)
            assert_matches(case, stats.cpu(), want)


def test_activity_stats_refuse_channels_that_do_not_divide(kernels):
    stats = torch.zeros(4, 6, dtype=torch.float64, device=kernels.device)
    x = torch.ones(2, 6, 1, device=kernels.device)
    for channels in (4, -1):
        with pytest.raises(RuntimeError, match="channels must be 0 or divide the features"):
            kernels.op("activity_stats_")(stats, x, 0.0, channels)
    assert not stats.any()


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_activity_stats_reads_nothing_but_its_input(kernels, dtype):
    shapes = [(1, 1, 1), (63, 129, 1), (130, 64, 1), (3, 2, 49), (2, 9, 196), (7, 5, 2)]
    for shape in shapes:
        for offset in (0, 1, 3):
            case = Case(*shape, dtype, offset=offset)
            for _ in kernels.orders(seed=offset):
                assert_matches(case, run(kernels, case))


def test_activity_stats_needs_every_barrier(kernels):
    cases = [Case(300, 40, 1), Case(20, 3, 700)]
    want = [expected(case) for case in cases]

    def check():
        for case, stats in zip(cases, want, strict=True):
            assert_matches(case, run(kernels, case), stats)

    kernels.assert_every_barrier_is_needed(check, "activity_stats.cuh")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_pattern_is_widened(kernels, dtype):
    # One feature per pattern: the maximum and the sum are then the widened magnitude itself.
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    stats = torch.zeros(4, 1 << 16, dtype=torch.float64, device=kernels.device)
    kernels.op("activity_stats_")(stats, patterns.reshape(1, -1, 1).to(kernels.device), 0.0)
    want = patterns.double().abs()
    assert torch.equal(stats[3].cpu().nan_to_num(-1.0), want.nan_to_num(-1.0))
    assert torch.equal(stats[0].cpu().nan_to_num(-1.0), want.nan_to_num(-1.0))


def test_activity_stats_launcher_refuses_what_it_cannot_take(kernels):
    call, device = kernels.op("activity_stats_"), kernels.device
    stats = torch.zeros(4, 3, dtype=torch.float64, device=device)
    x = torch.zeros(2, 3, 1, device=device)
    with pytest.raises(RuntimeError, match=r"activity_stats_: x must be contiguous \[N, F, P\]"):
        call(stats, x[:, :, 0], 0.0)
    with pytest.raises(RuntimeError, match="stats must be Double, got Float"):
        call(stats.float(), x, 0.0)
    with pytest.raises(RuntimeError, match=r"stats must have shape \[4, 3\], got \[4, 2\]"):
        call(stats[:, :2].contiguous(), x, 0.0)
    with pytest.raises(RuntimeError, match="x must be Float or BFloat16 or Half, got Double"):
        call(stats, x.double(), 0.0)
    with pytest.raises(RuntimeError, match="eps must be >= 0, got -1"):
        call(stats, x, -1.0)
    call(stats, x[:0], 0.0)
    assert not stats.any()


@pytest.mark.gpu
def test_activity_stats_repeats_to_the_bit_and_runs_in_a_cuda_graph(gpu):
    x = torch.randn(3000, 515, 1, device=gpu)
    stats = torch.zeros(4, 515, dtype=torch.float64, device=gpu)
    torch.ops.liveweight.activity_stats_(stats, x, 0.0)
    first = stats.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.liveweight.activity_stats_(stats, x, 0.0)
    stats.zero_()
    graph.replay()
    assert torch.equal(stats, first)
