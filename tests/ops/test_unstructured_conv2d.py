"""unstructured_conv2d against float64 dense layers: values, gradients, edges, tracing, messages."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from liveweight import reference
from liveweight.formats import UnstructuredKernels
from liveweight.ops import unstructured_conv2d

OPS = torch.ops.liveweight
LAYOUTS = ("contiguous", "channels_last", "batch_last")


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
    tile: tuple[int, int] | None = None

    def make(self, density: float = 0.4, dtype=torch.float32):
        """Return (x, dense weight with missing entries, its format, bias)."""
        shape = (self.filters, self.channels // self.groups, *self.kernel)
        weight = torch.randn(shape, dtype=dtype) * (torch.rand(shape) < density)
        x = torch.randn(self.batch, self.channels, *self.size, dtype=dtype)
        packed = UnstructuredKernels.from_dense(weight, tile=self.tile)
        return x, weight, packed, torch.randn(self.filters, dtype=dtype)

    @property
    def options(self) -> dict:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    @property
    def settings(self) -> tuple:
        return tuple(self.options.values())


def parts(packed: UnstructuredKernels) -> tuple:
    return packed.columns, packed.segments, packed.offsets, packed.shape, packed.tile


def expected(x, weight, bias, case, activation=None, pool=1):
    bias = None if bias is None else bias.double()
    y = F.conv2d(x.double(), weight.double(), bias, **case.options)
    y = y.relu() if activation else y
    return F.max_pool2d(y, pool) if pool > 1 else y


def assert_close(got, want, terms: int):
    # Rounding of a float32 sum of `terms` products of unit normals.
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6 * max(terms, 1) ** 0.5)


CASES = {
    "3x3": Case(),
    "3x3 wide": Case(size=(8, 33)),
    "3x3 on 16x16": Case(size=(16, 16), channels=23),
    "3x3 on 8x8": Case(size=(8, 8), channels=24, filters=70),
    "3x3 on 4x4": Case(size=(4, 4), channels=12),
    "3x3 on 1x1": Case(size=(1, 1)),
    "lenet 1": Case(1, 20, (5, 5), (28, 28), padding=(0, 0)),
    "1x1": Case(70, kernel=(1, 1), padding=(0, 0), size=(14, 14)),
    "1x1 padded": Case(kernel=(1, 1), padding=(2, 1)),
    "1x1 stride 2": Case(kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "stride 2": Case(stride=(2, 2)),
    "stride 2, even size": Case(stride=(2, 2), size=(16, 16)),
    "strides 3, 2": Case(stride=(3, 2)),
    "stride beyond the kernel": Case(kernel=(2, 2), stride=(3, 4), padding=(0, 0)),
    "7x7 stride 2": Case(kernel=(7, 7), stride=(2, 2), padding=(3, 3), size=(23, 21)),
    "dilation": Case(dilation=(2, 2), padding=(2, 2)),
    "dilation and stride": Case(dilation=(3, 2), stride=(2, 2), padding=(2, 3)),
    "uneven kernel": Case(kernel=(1, 4), padding=(0, 2)),
    "17x17": Case(kernel=(17, 17), padding=(8, 8)),
    "padding beyond the kernel": Case(padding=(4, 5)),
    "groups": Case(groups=2, filters=4),
    "depthwise": Case(groups=6, filters=12),
    "small tiles": Case(channels=10, filters=9, tile=(4, 3)),
    "groups across tiles": Case(channels=10, filters=12, groups=2, tile=(5, 2)),
    "one channel": Case(channels=1, filters=1, batch=1),
    "sixteen samples": Case(batch=16),
    "many samples": Case(batch=17, size=(5, 6)),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


@pytest.mark.parametrize("activation", [None, "relu"])
def test_forward(case, activation):
    x, weight, packed, bias = case.make()
    for b in (None, bias):
        got = unstructured_conv2d(x, packed, b, activation=activation, **case.options)
        assert_close(got, expected(x, weight, b, case, activation), weight[0].numel())


@pytest.mark.parametrize("pool", [2, 3])
def test_fused_pool(case, pool):
    x, weight, packed, bias = case.make()
    options = case.options | {"activation": "relu", "pool": pool}
    if min(F.conv2d(x, weight, **case.options).shape[2:]) < pool:
        with pytest.raises(ValueError, match=f"is too small for .* pool {pool}"):
            unstructured_conv2d(x, packed, bias, **options)
        return
    got = unstructured_conv2d(x, packed, bias, **options)
    assert_close(got, expected(x, weight, bias, case, "relu", pool), weight[0].numel())


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    return reference.lay_out(x, LAYOUTS.index(layout))


@pytest.mark.parametrize("to", [None, *LAYOUTS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch,pool", [(1, 1), (3, 2), (19, 1), (32, 2)])
def test_layouts(layout, to, batch, pool):
    case = Case(channels=7, filters=18, batch=batch, size=(8, 9))
    x, weight, packed, bias = case.make()
    y = unstructured_conv2d(lay_out(x, layout), packed, bias, pool=pool, layout=to, **case.options)
    want = expected(x, weight, bias, case, pool=pool)
    assert_close(y, want, 63)
    # None: as x lies. A batch of one that lies batch last is contiguous as well.
    wanted = to or (layout if batch > 1 or layout != "batch_last" else "contiguous")
    assert y.stride() == lay_out(torch.empty(y.shape), wanted).stride()


def test_any_strides():
    case = Case(channels=4)
    x, weight, packed, bias = case.make()
    wide = torch.randn(3, 4, 9, 22)
    for other in (
        x.flip(3).contiguous().flip(3),
        wide[..., ::2],
        wide[:, :, :, :11],
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        want = expected(other, weight, bias, case)
        assert_close(unstructured_conv2d(other, packed, bias, **case.options), want, 36)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_nothing_and_everything_kept(batch, density):
    case = Case(batch=batch)
    x, weight, packed, bias = case.make(density)
    for pool in (1, 2):
        got = unstructured_conv2d(x, packed, bias, activation="relu", pool=pool, **case.options)
        want = expected(x, weight, bias, case, "relu", pool) if batch else got.double()
        assert got.shape == (batch, 5, 9 // pool, 11 // pool)
        assert_close(got, want, 54)


def test_one_sample_without_a_batch():
    case = Case()
    x, weight, packed, bias = case.make()
    got = unstructured_conv2d(x[0], packed, bias, pool=2, padding=1)
    assert_close(got, expected(x[0], weight, bias, case, pool=2), 54)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["3x3", "1x1", "stride 2", "many samples"])
def test_missing_entries_stop_nan_and_inf(name, poison):
    case = dataclasses.replace(CASES[name], filters=9)
    x, weight, packed, bias = case.make(0.05)
    x[:, 2] = poison
    got = unstructured_conv2d(x, packed, bias, **case.options)
    reached = (weight[:, 2] != 0).flatten(1).any(1)
    clean = x.clone()
    clean[:, 2] = 0
    want = expected(clean, weight, bias, case)
    assert_close(got[:, ~reached], want[:, ~reached], 54)
    assert not bool(got[:, reached].isfinite().all(3).all(2).any())


def test_relu_and_pool_keep_nan():
    packed = UnstructuredKernels.from_dense(torch.ones(1, 1, 1, 1))
    case = Case(kernel=(1, 1), padding=(0, 0))
    for place in range(54):
        x = -torch.rand(1, 1, 54)
        x[..., place] = float("nan")
        x = x.view(1, 1, 6, 9)
        for pool in (1, 2, 3):
            got = unstructured_conv2d(x, packed, activation="relu", pool=pool)
            want = expected(x, torch.ones(1, 1, 1, 1), None, case, "relu", pool)
            assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("activation,pool", [(None, 1), ("relu", 1), ("relu", 2)])
def test_gradients(case, activation, pool):
    x, weight, packed, bias = case.make()
    if min(F.conv2d(x, weight, **case.options).shape[2:]) < pool:
        pytest.skip("nothing to pool")
    for tensor in (x, packed.values, bias):
        tensor.requires_grad_()
    y = unstructured_conv2d(x, packed, bias, activation=activation, pool=pool, **case.options)
    grad = torch.randn_like(y)
    y.backward(grad)
    dense = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected(*dense, case, activation, pool).backward(grad.double())
    assert_close(x.grad, dense[0].grad, weight[:, 0].numel())
    filters, columns = packed.coordinates()
    want = dense[1].grad.flatten(1)[filters, columns]
    assert_close(packed.values.grad, want, x[:, 0].numel())
    assert_close(bias.grad, dense[2].grad, x[:, 0].numel())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_every_layout(layout):
    case = Case(batch=18)
    x, weight, packed, bias = case.make()
    x = lay_out(x, layout).requires_grad_()
    packed.values.requires_grad_()
    y = unstructured_conv2d(x, packed, bias, activation="relu", padding=1)
    grad = torch.randn(y.shape)
    y.backward(grad)
    dense = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected(*dense, bias, case, "relu").backward(grad.double())
    assert_close(x.grad, dense[0].grad, 45)
    filters, columns = packed.coordinates()
    assert_close(packed.values.grad, dense[1].grad.flatten(1)[filters, columns], 1800)


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
def test_only_the_wanted_gradient(wanted):
    x, _, packed, bias = Case().make()
    tensors = {"x": x, "values": packed.values, "bias": bias}
    tensors[wanted].requires_grad_()
    unstructured_conv2d(x, packed, bias, pool=2).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is not None} == {wanted}


def test_a_gradient_without_memory_of_its_own():
    case = Case(stride=(2, 2))
    x, weight, packed, _ = case.make()
    x.requires_grad_(), packed.values.requires_grad_()
    unstructured_conv2d(x, packed, **case.options).sum().backward()  # its gradient has strides of 0
    dense = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected(*dense, None, case).sum().backward()
    assert_close(x.grad, dense[0].grad, 45)
    filters, columns = packed.coordinates()
    assert_close(packed.values.grad, dense[1].grad.flatten(1)[filters, columns], 300)


def test_gradients_of_an_empty_batch_are_zero():
    x, _, packed, bias = Case(batch=0).make()
    for tensor in (x, packed.values, bias):
        tensor.requires_grad_()
    unstructured_conv2d(x, packed, bias, activation="relu").sum().backward()
    assert x.grad.shape == x.shape and not packed.values.grad.any() and not bias.grad.any()


def test_gradcheck_in_float64():
    case = Case(channels=2, filters=2, size=(5, 4), stride=(1, 2), groups=2, batch=2)
    x, _, packed, bias = case.make(0.9, torch.float64)

    def run(x, values, bias):
        weight = dataclasses.replace(packed, values=values)
        return unstructured_conv2d(x, weight, bias, activation="relu", pool=2, **case.options)

    inputs = [t.requires_grad_() for t in (x, packed.values, bias)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)  # one random direction each


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_run_the_reference(dtype):
    case = CASES["stride 2"]
    x, weight, packed, bias = case.make(0.5, dtype)
    got = unstructured_conv2d(x, packed, bias, activation="relu", pool=2, **case.options)
    assert got.dtype == dtype
    close = {torch.float64: 1e-12, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
    want = expected(x, weight, bias, case, "relu", 2)
    torch.testing.assert_close(got.double(), want, rtol=close, atol=close)


def test_autocast_casts_the_input_back():
    case = Case()
    x, weight, packed, bias = case.make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = unstructured_conv2d(x.bfloat16(), packed, bias, **case.options)
    assert got.dtype == torch.float32
    assert_close(got, expected(x.bfloat16(), weight, bias, case), 54)


def run_all(x, packed, bias, grad, case) -> tuple:
    return (
        unstructured_conv2d(x, packed, bias, **case.options),
        OPS.unstructured_conv2d_grad_x(
            grad, packed.values, *parts(packed), x.shape, *case.settings
        ),
        OPS.unstructured_conv2d_grad_values(grad, x, *parts(packed), *case.settings),
    )


@pytest.mark.parametrize("batch", [1, 3, 17, 40])
def test_threads_change_nothing(batch):
    case = Case(channels=24, filters=70, size=(12, 12), batch=batch)
    x, _, packed, bias = case.make()
    grad = torch.randn(batch, 70, 12, 12)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_all(x, packed, bias, grad, case))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_two_callers_at_once():
    case = Case(channels=16, filters=33, size=(16, 16), batch=5)
    x, _, packed, bias = case.make()
    want = unstructured_conv2d(x, packed, bias, **case.options)
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(unstructured_conv2d, x, packed, bias, **case.options) for _ in range(20)
        ]
        assert all(torch.equal(call.result(), want) for call in calls)


@pytest.mark.parametrize("layout", [0, 1, 2])
def test_opcheck(layout):
    case = Case(channels=4, filters=3, size=(5, 6), batch=2)
    x, weight, packed, bias = case.make()
    grad = torch.randn_like(F.conv2d(x, weight, **case.options))
    args = (x, packed.values, *parts(packed), bias, *case.settings, True, 2, layout)
    opcheck(OPS.unstructured_conv2d.default, args)
    args = (grad, packed.values, *parts(packed), x.shape, *case.settings)
    opcheck(OPS.unstructured_conv2d_grad_x.default, args)
    opcheck(OPS.unstructured_conv2d_grad_values.default, (grad, x, *parts(packed), *case.settings))


@pytest.mark.parametrize("backend,layout", [("aot_eager", "batch_last"), ("inductor", None)])
def test_compile_forward_and_backward(backend, layout):
    case = Case()
    x, _, packed, bias = case.make()

    def run(x, values, bias):
        weight = UnstructuredKernels(values, *parts(packed))
        options = {"activation": "relu", "pool": 2, "layout": layout} | case.options
        return unstructured_conv2d(x * 2, weight, bias, **options) + 1

    grads = []
    for function in (run, torch.compile(run, fullgraph=True, backend=backend)):
        inputs = [t.detach().clone().requires_grad_() for t in (x, packed.values, bias)]
        y = function(*inputs)
        y.pow(2).sum().backward()
        grads.append((y.detach(), *(t.grad for t in inputs)))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)


def bad_calls():
    x, weight, packed, bias = Case(size=(4, 5)).make()
    yield (x, weight, bias), {}, TypeError, "weight must be formats.UnstructuredKernels, got Tensor"
    yield ([1.0], packed, bias), {}, TypeError, "x must be a tensor, got list"
    yield (
        (x[:, :5], packed),
        {},
        ValueError,
        r"expected x \[B, 6, H, W\] or one sample, got \(3, 5,",
    )
    yield (
        (x[0, 0], packed),
        {},
        ValueError,
        r"expected x \[B, 6, H, W\] or one sample, got \(4, 5\)",
    )
    yield (x.double(), packed), {}, TypeError, "expected x float32 like values, got float64"
    yield (x, packed, bias[:4]), {}, ValueError, r"expected bias \[5\], got \(4,\)"
    yield (x, packed, bias.half()), {}, TypeError, "expected bias float32, got float16"
    yield (x, packed), {"stride": 0}, ValueError, "stride must be >= 1, got 0"
    yield (x, packed), {"padding": (1, -1)}, ValueError, r"padding must be >= 0, got \(1, -1\)"
    yield (x, packed), {"padding": "same"}, ValueError, "padding must be a whole number or two"
    yield (x, packed), {"dilation": (1, 1, 1)}, ValueError, "dilation must be a whole number or two"
    yield (x, packed), {"groups": 2}, ValueError, "5 filters do not form groups=2"
    yield (x, packed), {"groups": 0}, ValueError, "5 filters do not form groups=0"
    yield (x, packed), {"activation": "gelu"}, ValueError, "None or 'relu', got 'gelu'"
    yield (x, packed), {"pool": 0}, ValueError, "pool must be a whole number >= 1, got 0"
    yield (x, packed), {"layout": "nhwc"}, ValueError, "layout must be None or one of .*got 'nhwc'"
    yield (
        (x, packed),
        {"dilation": 2},
        ValueError,
        r"x of \(4, 5\) is too small for kernel \(3, 3\)",
    )
    yield (x, packed), {"pool": 3}, ValueError, r"pool 3: the convolution gives \(2, 3\)"


@pytest.mark.parametrize("number", range(len(list(bad_calls()))))
def test_messages(number):
    args, options, error, message = list(bad_calls())[number]
    with pytest.raises(error, match=message):
        unstructured_conv2d(*args, **options)


def test_launcher_guards_memory():
    case = Case(tile=(2, 3))
    x, _, packed, bias = case.make(1.0)
    names = ("columns", "segments", "offsets", "shape", "tile")
    index = dict(zip(names, parts(packed), strict=True))

    def call(x=x, values=packed.values, bias=bias, settings=case.settings, pool=1, layout=0, **new):
        weight = (index | new).values()
        return OPS.unstructured_conv2d(x, values, *weight, bias, *settings, False, pool, layout)

    def refuses(message, **new):
        with pytest.raises(RuntimeError, match=message):
            call(**new)

    refuses("expected 6 channels, got 4", x=x[:, :4])
    refuses("expected x .* float32", x=x.double())
    refuses("offsets must rise", offsets=packed.offsets.flip(0))
    refuses("expected 7 offsets, got 6", offsets=packed.offsets[:6])
    refuses("expected 270 values, got 269", values=packed.values[:269])
    refuses("columns has the wrong dtype", columns=packed.columns.int())
    refuses("bad tile", tile=(300, 3))
    refuses(r"expected bias \[5\]", bias=bias[:4])
    refuses("is smaller than the kernel", x=x[:, :, :1], settings=((1, 1), (0, 0), (1, 1), 1))
    refuses("stride must be two numbers >= 1", settings=((0, 1), *case.settings[1:]))
    refuses("do not form 4 groups", settings=(*case.settings[:3], 4))
    refuses("cannot pool 9 x 11 by 10", pool=10)
    refuses("layout must be", layout=3)
    # Any byte may stand in the index: the numbers are wrong then, but no foreign memory is touched.
    for name in ("columns", "segments"):
        assert call(**{name: torch.full_like(index[name], 255)}).shape == (3, 5, 9, 11)
    wide = UnstructuredKernels.from_dense(torch.randn(5, 1, 17, 17))
    weight = (wide.values, wide.columns + 1, *parts(wide)[1:])
    with pytest.raises(RuntimeError, match="columns or segments leave their tile"):
        OPS.unstructured_conv2d(
            torch.randn(1, 1, 20, 20), *weight, None, [1, 1], [0, 0], [1, 1], 1, False, 1, 0
        )
