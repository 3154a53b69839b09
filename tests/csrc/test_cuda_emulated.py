"""Values of the CUDA C++ kernels: on the CPU by tests/cuda_host, on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import struct
import subprocess

import pytest
import torch

from liveweight import reference

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOST = ROOT / "tests" / "cuda_host"
TYPES = [torch.float32, torch.bfloat16, torch.float16]
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
# At most 32 terms are added in float32 before each flush to float64: 32 * 2**-24.
TOLERANCE = 32 * 2.0**-24
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: x [rows, features, run], `offset` elements after a 16-byte boundary."""

    rows: int
    features: int
    run: int
    dtype: torch.dtype = torch.float32
    offset: int = 0
    eps: float = 0.1
    order: str = "forward"
    seed: int = 0
    dropped_barrier: int = 0
    one_split: bool = False
    nan_at: int | None = None

    def x(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.rows * 31 + self.features * 7 + self.run)
        size = (self.rows, self.features, self.run)
        x = torch.randn(size, generator=generator).to(self.dtype)
        if self.nan_at is not None:
            x.view(-1)[self.nan_at] = float("nan")
        return x

    def packed(self) -> bytes:
        numbers = (self.rows, self.features, self.run, self.eps, TYPES.index(self.dtype))
        schedule = (self.offset, ORDERS[self.order], self.seed)
        switches = (self.dropped_barrier, int(self.one_split))
        return struct.pack("<qqqdiiiiii", *numbers, *schedule, *switches) + bytes(
            self.x().view(torch.uint8).flatten().numpy()
        )


def build(folder: pathlib.Path, *flags: str) -> pathlib.Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the emulator of CUDA C++ cannot be compiled")
    program = folder / "activity_stats_host"
    subprocess.run(
        [compiler, "-std=c++20", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        + ["-include", "cuda_host.h", "-I.", "-I../../csrc/cuda", *flags]
        + ["activity_stats_host.cpp", "-o", str(program)],
        cwd=HOST,
        check=True,
    )
    return program


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> pathlib.Path:
    return build(tmp_path_factory.mktemp("emulator"), "-O2")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> pathlib.Path:
    return build(tmp_path_factory.mktemp("sanitized"), *SANITIZE)


def run(program: pathlib.Path, cases: list[Case], *options: str) -> tuple[list, str]:
    """Return per case stats [4, F] or the emulator's error text, and what the program printed."""
    inputs, outputs = program.with_suffix(".in"), program.with_suffix(".out")
    inputs.write_bytes(b"".join(case.packed() for case in cases))
    done = subprocess.run(
        [str(program), str(inputs), str(outputs), *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    data, at, results = bytearray(outputs.read_bytes()), 0, []
    for case in cases:
        length = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if length:
            results.append(data[at : at + length].decode())
            at += length
        else:
            count = 4 * case.features
            stats = torch.frombuffer(data, dtype=torch.float64, count=count, offset=at)
            results.append(stats.reshape(4, -1).clone())
            at += 8 * count
    return results, done.stdout


def expected(case: Case) -> torch.Tensor:
    stats = torch.zeros(4, case.features, dtype=torch.float64)
    reference.activity_stats_(stats, case.x(), case.eps)
    return stats


def assert_matches(case: Case, got) -> None:
    assert not isinstance(got, str), f"{case}: {got}"
    want = expected(case)
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


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_activity_stats_equals_the_reference_in_every_order(emulator, dtype):
    cases = [
        Case(*shape, dtype, offset=offset, order=order, seed=seed)
        for seed, shape in enumerate(SHAPES)
        for offset in (0, 1)
        for order in ORDERS
    ]
    for case, got in zip(cases, run(emulator, cases)[0], strict=True):
        assert_matches(case, got)


def test_activity_stats_flushes_long_sums(emulator):
    # 29 + 28 + 3 rows per thread and the like: more than one float32 window, and a remainder.
    shapes = [(8 * 60, 256, 1), (8 * 61 + 3, 33, 1), (30, 9, 196), (40, 1, 3001)]
    cases = [Case(*shape, dtype, one_split=True) for shape in shapes for dtype in TYPES]
    for case, got in zip(cases, run(emulator, cases)[0], strict=True):
        assert_matches(case, got)


def test_activity_stats_shows_nan_wherever_it_stands(emulator):
    cases = [
        Case(*shape, dtype, nan_at=at)
        for shape in [(40, 16, 1), (3, 4, 50), (3, 2, 64), (9, 3, 2)]
        for dtype in TYPES
        for at in (0, -1, shape[0] * shape[1] * shape[2] // 2)
    ]
    for case, got in zip(cases, run(emulator, cases)[0], strict=True):
        assert_matches(case, got)
        assert got[0].isnan().sum() == 1


def test_activity_stats_compares_with_eps_as_float64_does(emulator):
    # 0.3 and 0.7 are no float32: one is rounded up, the other down. Both neighbours are in x.
    class Near(Case):
        def x(self):
            middle = torch.tensor(self.eps, dtype=torch.float32)
            steps = [torch.nextafter(middle, torch.tensor(to)) for to in (0.0, 1.0)]
            return torch.stack([steps[0], middle, steps[1]]).reshape(3, 1, 1)

    cases = [Near(3, 1, 1, eps=0.3), Near(3, 1, 1, eps=0.7), Case(257, 8, 1, eps=1e-50)]
    results, _ = run(emulator, cases)
    for case, got in zip(cases, results, strict=True):
        assert_matches(case, got)
    assert {int(got[2, 0]) for got in results[:2]} == {1, 2}


def test_activity_stats_is_clean_under_address_and_undefined_sanitizers(sanitized):
    cases = [
        Case(*shape, dtype, offset=offset, order="random", seed=offset)
        for shape in [(1, 1, 1), (63, 129, 1), (130, 64, 1), (3, 2, 49), (2, 9, 196), (7, 5, 2)]
        for dtype in TYPES
        for offset in (0, 1, 3)
    ]
    for case, got in zip(cases, run(sanitized, cases)[0], strict=True):
        assert_matches(case, got)


def test_emulator_catches_every_removed_barrier(emulator):
    # Each kernel's barriers are met by one of these; without any one of them some order goes wrong.
    shapes = [(300, 40, 1), (20, 3, 700)]
    _, printed = run(emulator, [Case(*shape) for shape in shapes], "--barriers")
    lines = [int(line) for line in printed.split()]
    source = (ROOT / "csrc" / "cuda" / "activity_stats.cuh").read_text()
    assert len(lines) == source.count("__syncthreads();")
    for line in lines:
        cases = [
            Case(*shape, order=order, seed=3, dropped_barrier=line)
            for shape in shapes
            for order in ORDERS
        ]
        caught = 0
        for case, got in zip(cases, run(emulator, cases)[0], strict=True):
            want = expected(case)
            wrong = isinstance(got, str) or not torch.allclose(got, want, rtol=TOLERANCE, atol=0)
            caught += wrong
        assert caught > 0, f"the barrier at line {line} was removed and nothing noticed"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_activity_stats_on_the_gpu_equals_the_reference(gpu, dtype):
    for shape in [*SHAPES, (4099, 1024, 1), (16, 64, 3136), (1, 3, 300000)]:
        for offset in (0, 1):
            case = Case(*shape, dtype)
            x = case.x()
            moved = torch.empty(x.numel() + offset, dtype=dtype, device=gpu)[offset:]
            moved = moved.view(x.shape).copy_(x)
            stats = torch.zeros(4, case.features, dtype=torch.float64, device=gpu)
            torch.ops.liveweight.activity_stats_(stats, moved, case.eps)
            assert_matches(case, stats.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_pattern_is_widened_on_the_gpu(gpu, dtype):
    # One feature per pattern: the maximum and the sum are then the widened magnitude itself.
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    stats = torch.zeros(4, 1 << 16, dtype=torch.float64, device=gpu)
    torch.ops.liveweight.activity_stats_(stats, patterns.reshape(1, -1, 1).to(gpu), 0.0)
    want = patterns.double().abs()
    assert torch.equal(stats[3].cpu().nan_to_num(-1.0), want.nan_to_num(-1.0))
    assert torch.equal(stats[0].cpu().nan_to_num(-1.0), want.nan_to_num(-1.0))


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
