"""kernelwise_conv2d in CUDA C++: its values, on the emulator and on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from liveweight import reference
from liveweight.formats import Kernelwise

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding of the result; the sums are fp32 for every type.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution; pairs are (height, width)."""

    channels: int = 6
    filters: int = 5
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (9, 11)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch: int = 3
    density: float = 0.5

    def make(self, dtype: torch.dtype = torch.float32):
        """Return (x, dense weight with missing kernels, its format, bias)."""
        generator = torch.Generator().manual_seed(hash(dataclasses.astuple(self)) % 2**31)
        shape = (self.filters, self.channels // self.groups, *self.kernel)
        weight = torch.randn(shape, generator=generator).to(dtype)
        kept = torch.rand(*shape[:2], 1, 1, generator=generator) < self.density
        weight = torch.where(kept, weight, 0)
        x = torch.randn(self.batch, self.channels, *self.size, generator=generator).to(dtype)
        bias = torch.randn(self.filters, generator=generator).to(dtype)
        return x, weight, Kernelwise.from_dense(weight), bias

    @property
    def settings(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups


def run(kernels, case: Case, x, packed, bias, relu=False, pool=1, layout=0) -> torch.Tensor:
    parts = (packed.values, packed.filter_offsets, packed.channels, bias)
    parts = [None if part is None else part.to(kernels.device) for part in parts]
    args = (*case.settings, relu, pool, layout)
    return kernels.op("kernelwise_conv2d")(x.to(kernels.device), *parts, *args).cpu()


def expected(case: Case, x, weight, bias, relu=False, pool=1) -> torch.Tensor:
    bias = None if bias is None else bias.double()
    y = F.conv2d(x.double(), weight.double(), bias, *case.settings)
    y = y.relu() if relu else y
    return F.max_pool2d(y, pool) if pool > 1 else y


def assert_close(case: Case, got: torch.Tensor, want: torch.Tensor) -> None:
    terms = case.channels // case.groups * case.kernel[0] * case.kernel[1]
    torch.testing.assert_close(
        got.double(),
        want,
        rtol=ROUNDING[got.dtype],
        atol=3e-6 * terms**0.5,
        equal_nan=True,
        msg=lambda text: f"{case}: {text}",
    )


def check(kernels, case: Case, dtype=torch.float32, relu=False, pool=1, layout=0) -> None:
    x, weight, packed, bias = case.make(dtype)
    for b in (None, bias):
        got = run(kernels, case, x, packed, b, relu, pool, layout)
        assert_close(case, got, expected(case, x, weight, b, relu, pool))


CASES = {
    "3x3": Case(),
    "3x3, whole quads": Case(19, 20, size=(16, 16), batch=2),
    "3x3, many filters": Case(9, 37, size=(8, 8), batch=5),
    "3x3, seven rows": Case(7, 9, size=(14, 14), batch=3),
    "3x3, 7x7 pictures": Case(5, 9, size=(7, 7), batch=9),
    "3x3 on 4x4": Case(12, 18, size=(4, 4), batch=35),
    "3x3 on 1x1": Case(size=(1, 1)),
    "3x3, tiles of one picture": Case(3, 4, size=(37, 150), batch=1),
    "3x3, wide": Case(2, 3, size=(5, 133), batch=2),
    "3x3, no padding": Case(size=(9, 12), padding=(0, 0)),
    "3x3, wide padding": Case(padding=(4, 5)),
    "3x3 in groups": Case(8, 6, groups=2),
    "3x3, nothing kept": Case(density=0.0),
    "3x3, all kept": Case(density=1.0),
    "3x3, chunks of channels": Case(70, 19, size=(16, 16), batch=1, density=0.3),
    "1x1": Case(7, 9, (1, 1), (13, 29), padding=(0, 0), batch=2),
    "1x1, rows folded": Case(33, 20, (1, 1), (6, 14), padding=(0, 0), batch=2),
    "1x1, padded": Case(kernel=(1, 1), padding=(2, 1)),
    "1x1 in groups": Case(6, 4, (1, 1), (3, 7), padding=(0, 0), groups=2, batch=18),
    "5x5": Case(5, 9, (5, 5), (14, 14), padding=(2, 2)),
    "5x5, lenet": Case(1, 20, (5, 5), (28, 28), padding=(0, 0), density=1.0),
    "3x3, stride 2": Case(stride=(2, 2), size=(16, 16)),
    "3x3, stride 2, odd": Case(7, 18, stride=(2, 2), size=(15, 21), batch=2),
    "strides 3, 2": Case(stride=(3, 2)),
    "1x1, stride 2": Case(kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "7x7, stride 2": Case(3, 5, (7, 7), (23, 21), stride=(2, 2), padding=(3, 3)),
    "dilation": Case(dilation=(2, 2), padding=(2, 2)),
    "dilation and stride": Case(dilation=(3, 2), stride=(2, 2), padding=(2, 3)),
    "1x4": Case(kernel=(1, 4), padding=(0, 2)),
    "depthwise": Case(6, 12, groups=6),
}
TILED = [name for name in CASES if name.startswith(("3x3", "1x1", "5x5")) and "kept" not in name]
ROWS = {"3x3": (8, 7, 4), "1x1": (8, 7, 4), "5x5": (4,), "3x3, stride 2": (4,)}
CHEAPEST, TILED_WAY, DIRECT_WAY = range(3)


@contextlib.contextmanager
def plan(kernels, way: int, rows: int = 0, warps: int = 0):
    """Plan so inside the with block; a GPU always plans as the shapes say."""
    if not kernels.emulated:
        yield
        return
    wish = kernels.probe("wish_kernelwise_conv2d")
    wish(way, rows, warps)
    try:
        yield
    finally:
        wish(CHEAPEST, 0, 0)


@pytest.mark.parametrize("name", CASES)
def test_values(kernels, name):
    check(kernels, CASES[name], relu="stride" in name)


@pytest.mark.parametrize("name", CASES)
def test_every_lane_by_itself(kernels, name):
    with plan(kernels, DIRECT_WAY):
        check(kernels, CASES[name], relu=True)


@pytest.mark.parametrize("name", TILED)
def test_tiles(kernels, name):
    kind = "3x3, stride 2" if name.startswith("3x3, stride 2") else name[:3]
    for rows in ROWS[kind]:
        for warps in (8, 4):
            with plan(kernels, TILED_WAY, rows, warps):
                check(kernels, CASES[name])


ORDERS = ((0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0))  # of the layouts, by their codes
LAYOUTS_AND_POOLS = ((0, 0, 2), (0, 1, 1), (1, 1, 1), (1, 2, 3), (2, 0, 1), (2, 2, 2))
MIXED = ("3x3", "3x3, many filters", "1x1 in groups", "3x3, stride 2, odd", "dilation", "5x5")


@pytest.mark.parametrize("way", (TILED_WAY, DIRECT_WAY))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_types_layouts_and_pools(kernels, name, dtype, way):
    case = CASES[name]
    x, weight, packed, bias = case.make(dtype)
    with plan(kernels, way):
        for given, wanted, pool in LAYOUTS_AND_POOLS:
            picture = reference.lay_out(x, given)
            got = run(kernels, case, picture, packed, bias, True, pool, wanted)
            assert_close(case, got, expected(case, x, weight, bias, True, pool))
            assert got.permute(ORDERS[wanted]).is_contiguous()


def test_order_of_threads_changes_nothing(kernels):
    for name in ("3x3", "3x3, many filters", "1x1, rows folded", "dilation"):
        case = CASES[name]
        x, _, packed, bias = case.make()
        with plan(kernels, CHEAPEST if name == "dilation" else TILED_WAY):
            got = [run(kernels, case, x, packed, bias, pool=2) for _ in kernels.orders(seed=5)]
        assert all(torch.equal(y, got[0]) for y in got)


def test_every_plan_gives_the_same_bits(kernels):
    if not kernels.emulated:
        pytest.skip("a GPU always plans as the shapes say")
    case = CASES["3x3, many filters"]
    x, _, packed, bias = case.make()
    got = []
    for way, rows in ((DIRECT_WAY, 0), (TILED_WAY, 8), (TILED_WAY, 7), (TILED_WAY, 4)):
        with plan(kernels, way, rows):
            got.append(run(kernels, case, x, packed, bias))
    assert all(torch.equal(y, got[0]) for y in got)


@pytest.mark.parametrize("way", (TILED_WAY, DIRECT_WAY))
@pytest.mark.parametrize("poison", (float("nan"), float("inf")))
def test_removed_kernels_stop_nan_and_inf(kernels, poison, way):
    for name in ("3x3", "1x1", "3x3, stride 2"):
        case = CASES[name]
        x, weight, _, bias = case.make()
        reached = torch.arange(case.filters) % 3 == 0
        weight[:, 2] = torch.where(reached, 1.5, 0)[:, None, None]
        x[:, 2] = poison
        with plan(kernels, way):
            got = run(kernels, case, x, Kernelwise.from_dense(weight), bias)
        clean = x.clone()
        clean[:, 2] = 0
        want = expected(case, clean, weight, bias)
        assert_close(case, got[:, ~reached], want[:, ~reached])
        assert not bool(got[:, reached].isfinite().any())


@pytest.mark.parametrize("way", (TILED_WAY, DIRECT_WAY))
def test_relu_and_pool_keep_nan(kernels, way):
    case = Case(1, 1, (1, 1), (6, 9), padding=(0, 0), batch=1, density=1.0)
    packed = Kernelwise.from_dense(torch.ones(1, 1, 1, 1))
    for place in (0, 13, 53):
        x = -torch.ones(1, 1, 6, 9)
        x.view(-1)[place] = float("nan")
        for pool in (1, 2, 3):
            with plan(kernels, way):
                got = run(kernels, case, x, packed, None, True, pool)
            want = expected(case, x, torch.ones(1, 1, 1, 1), None, True, pool)
            assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
@pytest.mark.parametrize("offset", (0, 3, 8, 15))
def test_every_16_bit_pattern_is_widened(kernels, dtype, offset):
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.cat([patterns.new_zeros(offset), patterns]).to(kernels.device)[offset:]
    x = x[: (1 << 16) - offset].view(1, 1, 1, -1)
    packed = Kernelwise.from_dense(torch.ones(1, 1, 1, 1, dtype=dtype))
    case = Case(1, 1, (1, 1), padding=(0, 0))
    got = run(kernels, case, x, packed, None)
    # Adding to a sum of zero makes -0.0 zero.
    torch.testing.assert_close(got, x.cpu() + 0.0, rtol=0, atol=0, equal_nan=True)


def test_no_samples_no_filters_no_channels(kernels):
    for case in (Case(batch=0), Case(filters=0), Case(channels=0, filters=2)):
        x, weight, packed, bias = case.make()
        got = run(kernels, case, x, packed, bias)
        want = bias[:, None, None].expand(case.batch, case.filters, 9, 11)
        if case.channels:
            want = want[: case.batch, : case.filters]
        assert got.shape == want.shape and torch.equal(got, want)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("3x3", "1x1, rows folded", "3x3, stride 2, odd", "dilation"))
def test_reads_and_writes_nothing_else(kernels, name, dtype):
    case = CASES[name]
    x, weight, packed, bias = case.make(dtype)
    for offset in (0, 1):
        # Not a byte longer than the data, so that AddressSanitizer sees every access past its end.
        storage = torch.empty(x.numel() + offset, dtype=dtype, device=kernels.device)
        moved = storage[offset:].view(x.shape).copy_(x)
        for way in (TILED_WAY, DIRECT_WAY):
            with plan(kernels, way):
                got = run(kernels, case, moved, packed, bias, pool=2)
            assert_close(case, got, expected(case, x, weight, bias, pool=2))


def test_every_barrier_is_needed(kernels):
    cases = [dataclasses.replace(CASES["3x3, chunks of channels"], channels=40, size=(8, 8))]
    made = [case.make() for case in cases]
    want = [expected(case, x, weight, bias, pool=2) for case, (x, weight, _, bias) in
            zip(cases, made, strict=True)]  # fmt: skip

    def check_all():
        for case, (x, _, packed, bias), y in zip(cases, made, want, strict=True):
            with plan(kernels, TILED_WAY):
                assert_close(case, run(kernels, case, x, packed, bias, pool=2), y)

    kernels.assert_every_barrier_is_needed(check_all, "kernelwise_conv2d_tile.cuh")


def test_bad_calls_say_what_was_expected(kernels):
    case = Case(padding=(0, 0), density=1.0)
    x, _, packed, bias = case.make()
    parts = [packed.values, packed.filter_offsets, packed.channels, bias]

    def refuses(message, x=x, settings=case.settings, pool=1, layout=0, **changed):
        names = ("values", "filter_offsets", "channels", "bias")
        args = [changed.get(name, part) for name, part in zip(names, parts, strict=True)]
        args = [arg.to(kernels.device) for arg in (x, *args)]
        with pytest.raises(RuntimeError, match=message):
            kernels.op("kernelwise_conv2d")(*args, *settings, False, pool, layout)

    refuses("expected x contiguous, channels last or batch last", x=x.flip(0).mT)
    refuses("x must be Float or BFloat16 or Half, got Double",
            x=x.double(), values=packed.values.double(), bias=bias.double())  # fmt: skip
    refuses("values must be Float, got Double", values=packed.values.double())
    refuses(r"values must have shape \[30, \*, \*\], got \[29, 3, 3\]", values=packed.values[:29])
    refuses(r"bias must have shape \[5\], got \[4\]", bias=bias[:4])
    refuses("channels must be Int, got Long", channels=packed.channels.long())
    refuses("filter_offsets must have shape", filter_offsets=packed.filter_offsets[:, None])
    refuses("layout must be 0, 1 or 2, got 3", layout=3)
    refuses("is smaller than the kernel", x=x[:, :, :2].contiguous())
    refuses("stride must be two numbers >= 1", settings=((0, 1), *case.settings[1:]))
    refuses("padding must be two numbers >= 0", settings=((1, 1), (-1, 0), (1, 1), 1))
    refuses("do not form 4 groups", settings=(*case.settings[:3], 4))
    refuses("cannot pool 7 x 9 by 8", pool=8)
