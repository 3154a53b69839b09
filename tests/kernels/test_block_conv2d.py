"""Values of the Triton block_conv2d: in the interpreter, or on the GPU where there is one."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from liveweight import reference
from liveweight.formats import BlockKernels

from ..ops.block_convs import CASES, Case, index

kernel = pytest.importorskip("liveweight.kernels.block_conv2d", reason="triton is not installed")
grad_x = pytest.importorskip("liveweight.kernels.block_conv2d_grad_x")
grad_values = pytest.importorskip("liveweight.kernels.block_conv2d_grad_values")
linear = pytest.importorskip("liveweight.kernels.block_linear")
linear_grad = pytest.importorskip("liveweight.kernels.block_linear_grad")
tiles = pytest.importorskip("liveweight.kernels.tiles")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative to the largest output. Sums are float32 on both sides; what remains is one rounding to
# the dtype, which the interpreter does for bfloat16 by cutting off (a whole 2**-7). float32: three
# TF32 products on a GPU, and two orders of summing.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# The interpreter's own; it says nothing about the kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

TILES = {
    "a tap a step": tiles.Tile(64, 0, 16, warps=4, stages=2),
    "several taps a step, split": tiles.Tile(32, 0, 64, warps=4, stages=2, split=3),
}
WHOLE, SPLIT = TILES.values()


def assert_close(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.numel():
        scale = want.double().abs().max().clamp(min=1)
        error = (got.double() - want.double()).abs().max() / scale
        assert error <= TOLERANCE[got.dtype], f"error {error:.2e}"


def check_forward(case: Case, dtype, device, tile):
    x, _, packed, bias = case.make(dtype, device)
    args = (x, packed.values, *index(packed), bias, *case.settings, False)
    got = kernel.launch(*args, tile)
    assert got.permute(0, 2, 3, 1).is_contiguous()
    assert_close(got, reference.block_conv2d(*args))


def check_grad_x(case: Case, dtype, device, tile):
    x, _, packed, _ = case.make(dtype, device)
    grad = torch.randn(kernel_output(x, packed, case).shape, device=device).to(dtype)
    args = (grad, packed.values, *index(packed), tuple(x.shape), *case.settings)
    got = grad_x.launch(*args, tile)
    assert got.permute(0, 2, 3, 1).is_contiguous()
    assert_close(got, reference.block_conv2d_grad_x(*args))


def check_grad_values(case: Case, dtype, device, tile):
    x, _, packed, _ = case.make(dtype, device)
    grad = torch.randn(kernel_output(x, packed, case).shape, device=device).to(dtype)
    args = (grad, x, *index(packed), packed.block, *case.settings)
    assert_close(grad_values.launch(*args, tile), reference.block_conv2d_grad_values(*args))


def kernel_output(x, packed, case: Case):
    size = reference.conv2d_size(x.shape[2:], packed.shape[2:], *case.settings[:3])
    return x.new_empty(x.shape[0], packed.shape[0], *size)


CHECKS = {"forward": check_forward, "grad_x": check_grad_x, "grad_values": check_grad_values}
each_kernel = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)


@each_kernel
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_kind_of_convolution_equals_the_reference(device, case, tile, check):
    check(case, torch.float32, device, tile)


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["stride 2", "ragged channels", "wide blocks"])
def test_half_precision(device, name, dtype, check):
    check(CASES[name], dtype, device, SPLIT)


@each_kernel
def test_the_tiles_of_the_table(device, check):
    for dtype, block in [(torch.float32, (16, 16)), (torch.bfloat16, (64, 32))]:
        check(Case(64, 64, size=(4, 3), batch=1, block=block), dtype, device, None)


@each_kernel
def test_1x1_kernels_are_linear_layers(device, check, monkeypatch):
    taken = []
    for module, name in [(linear, "launch"), (linear, "launch_grad_x"),
                         (linear_grad, "launch_grad_values")]:  # fmt: skip
        launch = getattr(module, name)
        spy = lambda *args, launch=launch: taken.append(args) or launch(*args)  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    case = CASES["1x1"]
    check(case, torch.float32, device, None)
    assert len(taken) == 1
    check(dataclasses.replace(case, padding=(1, 0)), torch.float32, device, None)
    assert len(taken) == 1


@each_kernel
def test_parts_are_cut_and_added_up(device, check, monkeypatch):
    cut = []
    for module in (kernel, grad_x, grad_values):
        finish = module.finish
        spy = lambda work, *rest, finish=finish: cut.append(len(work)) or finish(work, *rest)  # noqa: E731
        monkeypatch.setattr(module, "finish", spy)
    case = Case(64, 64, size=(8, 8), density=1.0)
    check(case, torch.float32, device, tiles.Tile(64, 0, 32, warps=4, stages=2, split=4))
    assert cut == [4]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("tile", [WHOLE, SPLIT], ids=["whole", "split"])
def test_bias_and_relu_keep_nan(device, bias, tile):
    case = Case()
    x, _, packed, b = case.make(device=device)
    x[0, :, 0, 0] = float("nan")
    args = (x, packed.values, *index(packed), b if bias else None, *case.settings, True)
    got, want = kernel.launch(*args, tile), reference.block_conv2d(*args)
    assert torch.equal(got.isnan(), want.isnan()) and bool(got.isnan().any())
    assert_close(got.nan_to_num(0), want.nan_to_num(0))


def test_removed_blocks_are_not_read(device):
    case = Case(64, 32, density=1.0)
    x, weight, _, _ = case.make(device=device)
    weight[:16, 32:48] = 0
    packed = BlockKernels.from_dense(weight)
    x[:, 32:48] = float("nan")
    args = (x, packed.values, *index(packed), None, *case.settings, False)
    got = kernel.launch(*args, WHOLE)
    assert not got[:, :16].isnan().any() and got[:, 16:].isnan().all()


@pytest.mark.parametrize("case", [Case(batch=1), dataclasses.replace(CASES["1x1"], batch=1)])
def test_any_memory_layout_gives_the_same(device, case):
    x, _, packed, bias = case.make(device=device)
    parts, settings = index(packed), case.settings
    grad = torch.randn(x.shape[0], packed.shape[0], *case.size, device=device)

    def run(x, grad):
        return (
            kernel.launch(x, packed.values, *parts, bias, *settings, False),
            grad_x.launch(grad, packed.values, *parts, x.shape, *settings),
            grad_values.launch(grad, x, *parts, packed.block, *settings),
        )

    def turned(t):
        return t.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)

    want = run(x, grad)
    for lay_out in (torch.Tensor.contiguous, turned):
        for one, other in zip(run(lay_out(x), lay_out(grad)), want, strict=True):
            assert torch.equal(one, other)


def test_division_by_multiplication():
    for d in (1, 2, 3, 7, 49, 56, 3136, 2**16 + 1, 2**31 - 1):
        magic, shift = grad_values.find_magic(d)
        assert -(2**31) <= magic < 2**31
        for n in {0, 1, d - 1, d, d + 1, 7 * d - 1, 7 * d, 2**31 - 1}:
            if n < 2**31:
                assert (((n * (magic % 2**32)) >> 32) + n) >> shift == n // d


def test_launches_refuse_what_their_addresses_would_leave(device):
    case = Case()
    x, _, packed, bias = case.make(device=device)
    values, (offsets, columns, schedule, shape) = packed.values, index(packed)
    settings = case.settings
    names = ("x", "values", "row_offsets", "columns", "schedule", "shape", "bias")
    good = dict(zip(names, (x, values, offsets, columns, schedule, shape, bias), strict=True))
    good |= {**case.options, "relu": False}
    for error, message, change in [
        (ValueError, "values contiguous", {"values": values.mT.contiguous().mT}),
        (ValueError, "expected sides in", {"values": values[..., :8].contiguous()}),
        (TypeError, "like values", {"x": x.half()}),
        (TypeError, "float64", {"x": x.double(), "values": values.double()}),
        (ValueError, "do not form 1 groups", {"x": x[:, :16]}),
        (ValueError, "4 dimensions", {"x": x[0]}),
        (ValueError, "row_offsets contiguous", {"row_offsets": offsets[1:].contiguous()}),
        (ValueError, "columns contiguous", {"columns": columns[1:].contiguous()}),
        (ValueError, "schedule contiguous", {"schedule": schedule[1:].contiguous()}),
        (TypeError, "columns int32", {"columns": columns.long()}),
        (ValueError, "bias contiguous", {"bias": bias[1:].contiguous()}),
        (ValueError, "from 1 on", {"stride": (0, 1)}),
        (ValueError, r"gives \(-11, -10\) outputs", {"dilation": (9, 9)}),
        (ValueError, "must stay below", {"padding": (2**20, 2**20)}),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            kernel.launch(**good | change)
    grad = torch.randn(2, 32, 5, 7, device=device)
    with pytest.raises(ValueError, match=r"got grad \(2, 32, 5, 7\)"):
        grad_x.launch(grad, values, offsets, columns, schedule, shape, x.shape, *settings)
    with pytest.raises(ValueError, match=r"got grad \(2, 32, 5, 7\)"):
        grad_values.launch(grad, x, offsets, columns, schedule, shape, (16, 16), *settings)


def pairs(least: int, most: int):
    return st.tuples(st.integers(least, most), st.integers(least, most))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kernel_size=pairs(1, 4), stride=pairs(1, 4), padding=pairs(0, 4), dilation=pairs(1, 3),
    room=pairs(0, 5), groups=st.integers(1, 2), channels=st.integers(1, 40),
    panels=st.integers(1, 2), ragged=st.integers(0, 15),
    block=st.sampled_from([(16, 16), (16, 32)]),
    density=st.sampled_from([0.3, 0.7, 1.0]), tile=st.sampled_from(list(TILES.values())),
)  # fmt: skip
def test_any_convolution(
    kernel_size, stride, padding, dilation, room, groups, channels, panels, ragged, block, density,
    tile,
):  # fmt: skip
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    size = tuple(max(r + more - 2 * p, 1) for r, more, p in zip(reach, room, padding, strict=True))
    filters = 16 * panels * groups - (ragged if groups == 1 else 0)
    case = Case(
        channels * groups, filters, kernel_size, size, stride, padding, dilation, groups,
        batch=2, block=block, density=density,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for check in CHECKS.values():
        check(case, torch.float32, device, tile)
