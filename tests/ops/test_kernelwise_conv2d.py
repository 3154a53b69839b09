"""kernelwise_conv2d against float64 dense layers: values, gradients, edges, tracing, messages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from liveweight import reference
from liveweight.formats import Kernelwise
from liveweight.ops import kernelwise_conv2d

OPS = torch.ops.liveweight


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

    def make(self, density: float = 0.5, dtype=torch.float32):
        """Return (x, dense weight with missing kernels, its format, bias)."""
        shape = (self.filters, self.channels // self.groups, *self.kernel)
        weight = torch.randn(shape, dtype=dtype) * (torch.rand(*shape[:2], 1, 1) < density)
        x = torch.randn(self.batch, self.channels, *self.size, dtype=dtype)
        return x, weight, Kernelwise.from_dense(weight), torch.randn(self.filters, dtype=dtype)

    @property
    def options(self) -> dict:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    @property
    def settings(self) -> tuple:
        return tuple(self.options.values())


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
    "3x3 on 4x4": Case(size=(4, 4), channels=12),
    "3x3 on 1x1": Case(size=(1, 1)),
    "lenet 1": Case(1, 20, (5, 5), (28, 28), padding=(0, 0)),
    "lenet 2": Case(20, 9, (5, 5), (12, 12), padding=(0, 0)),
    "no padding": Case(padding=(0, 0)),
    "1x1": Case(kernel=(1, 1), padding=(0, 0), size=(14, 14)),
    "1x1 on many pixels": Case(7, 9, (1, 1), (13, 29), padding=(0, 0), groups=1, batch=2),
    "1x1 in groups": Case(6, 4, (1, 1), (3, 7), padding=(0, 0), groups=2, batch=18),
    "1x1 padded": Case(kernel=(1, 1), padding=(2, 1)),
    "1x1 stride 2": Case(kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "stride 2": Case(stride=(2, 2)),
    "stride 2, even size": Case(stride=(2, 2), size=(16, 16)),
    "stride 2, narrow": Case(size=(14, 15), stride=(2, 2), batch=2, groups=2, filters=4),
    "stride 2, one row": Case(size=(1, 3), stride=(2, 2), batch=1),
    "stride 2, wide": Case(size=(37, 70), stride=(2, 2), batch=1),
    "stride 2, wide, no padding": Case(size=(9, 71), stride=(2, 2), padding=(0, 0), batch=2),
    "strides 3, 2": Case(stride=(3, 2)),
    "stride beyond the kernel": Case(kernel=(2, 2), stride=(3, 4), padding=(0, 0)),
    "7x7 stride 2": Case(kernel=(7, 7), stride=(2, 2), padding=(3, 3), size=(23, 21)),
    "dilation": Case(dilation=(2, 2), padding=(2, 2)),
    "dilation and stride": Case(dilation=(3, 2), stride=(2, 2), padding=(2, 3)),
    "uneven kernel": Case(kernel=(1, 4), padding=(0, 2)),
    "11x11": Case(kernel=(11, 11), padding=(5, 5)),
    "padding beyond the kernel": Case(padding=(4, 5)),
    "groups": Case(groups=2, filters=4),
    "depthwise": Case(groups=6, filters=12),
    "one channel": Case(channels=1, filters=1, batch=1),
    "long band": Case(channels=2, filters=2, size=(150, 61), batch=1),
    "many samples": Case(batch=17),
    "rows of whole vectors": Case(size=(19, 48)),
    "rows of whole vectors, no padding": Case(size=(18, 34), padding=(0, 0)),
    "rows, uneven padding": Case(size=(3, 29), padding=(1, 0)),
    "narrow": Case(channels=9, size=(8, 8), batch=1),
    "narrow, odd": Case(channels=8, filters=6, size=(7, 7), batch=5, groups=2),
    "narrow, one row too many": Case(size=(9, 6), batch=2),
    "narrow, high": Case(size=(37, 5), batch=3),
    "one vector a plane": Case(channels=11, size=(4, 4), batch=7),
    "one vector a plane, small": Case(channels=4, filters=6, size=(3, 2), batch=2, groups=2),
    "two rows of eight": Case(size=(2, 7), batch=1),
    "three vectors a row": Case(size=(11, 43), batch=2, groups=2, filters=4),
    "two vectors a row": Case(size=(14, 30), batch=1),
    "samples side by side": Case(channels=5, size=(8, 8), batch=16),
    "samples side by side, ragged": Case(channels=4, size=(5, 7), batch=27, groups=2, filters=18),
    "samples side by side, no padding": Case(size=(6, 3), padding=(0, 0), batch=17),
    "samples side by side, uneven padding": Case(size=(2, 9), padding=(1, 0), batch=12),
    "samples side by side, stride 2": Case(size=(9, 8), stride=(2, 2), batch=33),
    "samples side by side, stride 2, no padding": Case(
        size=(8, 7), stride=(2, 2), padding=(0, 0), batch=16
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


@pytest.mark.parametrize("activation", [None, "relu"])
def test_forward(case, activation):
    x, weight, packed, bias = case.make()
    for b in (None, bias):
        got = kernelwise_conv2d(x, packed, b, activation=activation, **case.options)
        assert_close(got, expected(x, weight, b, case, activation), weight[0].numel())


@pytest.mark.parametrize("pool", [2, 3])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_fused_pool(case, activation, pool):
    x, weight, packed, bias = case.make()
    options = case.options | {"activation": activation, "pool": pool}
    if min(F.conv2d(x, weight, **case.options).shape[2:]) < pool:
        with pytest.raises(ValueError, match=f"is too small for .* pool {pool}"):
            kernelwise_conv2d(x, packed, bias, **options)
        return
    got = kernelwise_conv2d(x, packed, bias, **options)
    assert_close(got, expected(x, weight, bias, case, activation, pool), weight[0].numel())


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_nothing_and_everything_kept(batch, density):
    case = Case(batch=batch)
    x, weight, packed, bias = case.make(density)
    for pool in (1, 2):
        got = kernelwise_conv2d(x, packed, bias, activation="relu", pool=pool, **case.options)
        want = expected(x, weight, bias, case, "relu", pool) if batch else got.double()
        assert got.shape == (batch, 5, 9 // pool, 11 // pool)
        assert_close(got, want, 54)


def test_one_sample_without_a_batch():
    case = Case()
    x, weight, packed, bias = case.make()
    got = kernelwise_conv2d(x[0], packed, bias, pool=2, **case.options)
    assert_close(got, expected(x[0], weight, bias, case, pool=2), 54)


ORDERS = {"contiguous": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "batch_last": (1, 2, 3, 0)}


def lay_out(x, layout):
    order = ORDERS[layout]
    return x.permute(order).contiguous().permute(tuple(order.index(d) for d in range(4)))


LAYOUTS = tuple(ORDERS)


@pytest.mark.parametrize("given", LAYOUTS)
def test_layouts(case, given):
    x, weight, packed, bias = case.make()
    want = expected(x, weight, bias, case, "relu")
    x = lay_out(x, given)
    for wanted in (None, *LAYOUTS):
        options = {"activation": "relu", "layout": wanted} | case.options
        got = kernelwise_conv2d(x, packed, bias, **options)
        assert_close(got, want, weight[0].numel())
        if wanted or (case.channels > 1 and min(case.size) > 1 and case.batch > 1):
            assert got.permute(ORDERS[wanted or given]).is_contiguous()


def test_other_strides_become_contiguous():
    case = Case(channels=4)
    _, weight, packed, bias = case.make()
    wide = torch.randn(3, 4, 9, 22)[..., ::2]
    assert not wide.is_contiguous()
    got = kernelwise_conv2d(wide, packed, bias, **case.options)
    assert got.is_contiguous()
    assert_close(got, expected(wide, weight, bias, case), 54)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_gradients(layout):
    case = Case(stride=(2, 1))
    x, weight, packed, bias = case.make()
    dense = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = expected(*dense, case, "relu")
    grad = torch.randn_like(want)
    want.backward(grad)
    x = lay_out(x, layout).requires_grad_()
    packed.values.requires_grad_()
    options = {"activation": "relu"} | case.options
    kernelwise_conv2d(x, packed, bias, **options).backward(lay_out(grad.float(), layout))
    kept = (weight != 0).flatten(2).any(2)
    assert_close(x.grad, dense[0].grad, weight[:, 0].numel())
    assert_close(packed.values.grad, dense[1].grad[kept], x[:, 0].numel())


def test_whole_numbers_stand_for_pairs():
    case = Case(stride=(2, 2), padding=(2, 2), dilation=(2, 2))
    x, weight, packed, bias = case.make()
    got = kernelwise_conv2d(x, packed, bias, stride=2, padding=2, dilation=2)
    assert_close(got, expected(x, weight, bias, case), 54)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["3x3", "1x1", "stride 2"])
def test_removed_kernels_stop_nan_and_inf(name, poison):
    case = CASES[name]
    x, weight, packed, bias = case.make(0.4)
    x[:, 2] = poison
    got = kernelwise_conv2d(x, packed, bias, **case.options)
    reached = (weight[:, 2] != 0).flatten(1).any(1)
    assert 0 < int(reached.sum()) < 5
    clean = x.clone()
    clean[:, 2] = 0
    want = expected(clean, weight, bias, case)
    assert_close(got[:, ~reached], want[:, ~reached], 54)
    assert not bool(got[:, reached].isfinite().any())


def test_relu_and_pool_keep_nan():
    case = Case(channels=1, filters=1, kernel=(1, 1), size=(6, 9), padding=(0, 0), batch=1)
    packed = Kernelwise.from_dense(torch.ones(1, 1, 1, 1))
    for place in range(54):
        x = -torch.rand(1, 1, 54)
        x[..., place] = float("nan")
        x = x.view(1, 1, 6, 9)
        for pool in (1, 2, 3):
            got = kernelwise_conv2d(x, packed, activation="relu", pool=pool)
            assert torch.equal(
                got.isnan(), expected(x, torch.ones(1, 1, 1, 1), None, case, "relu", pool).isnan()
            )


@pytest.mark.parametrize("activation,pool", [(None, 1), ("relu", 1), (None, 2), ("relu", 2)])
def test_gradients(case, activation, pool):
    x, weight, packed, bias = case.make()
    if min(F.conv2d(x, weight, **case.options).shape[2:]) < pool:
        pytest.skip("nothing to pool")
    for tensor in (x, packed.values, bias):
        tensor.requires_grad_()
    y = kernelwise_conv2d(x, packed, bias, activation=activation, pool=pool, **case.options)
    grad = torch.randn_like(y)
    y.backward(grad)
    dense = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected(*dense, case, activation, pool).backward(grad.double())
    kept = (weight != 0).flatten(2).any(2)
    assert_close(x.grad, dense[0].grad, weight[:, 0].numel())
    assert_close(packed.values.grad, dense[1].grad[kept], x[:, 0].numel())
    assert_close(bias.grad, dense[2].grad, x[:, 0].numel())


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
def test_only_the_wanted_gradient(wanted):
    x, _, packed, bias = Case().make()
    tensors = {"x": x, "values": packed.values, "bias": bias}
    tensors[wanted].requires_grad_()
    kernelwise_conv2d(x, packed, bias, pool=2).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is not None} == {wanted}


def test_gradients_of_an_empty_batch_are_zero():
    x, _, packed, bias = Case(batch=0).make()
    for tensor in (x, packed.values, bias):
        tensor.requires_grad_()
    kernelwise_conv2d(x, packed, bias, activation="relu").sum().backward()
    assert x.grad.shape == x.shape and not packed.values.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("activation,pool", [(None, 1), ("relu", 1), ("relu", 2)])
def test_gradcheck_in_float64(activation, pool):
    case = Case(channels=2, filters=2, size=(5, 4), stride=(1, 2), groups=2, batch=2)
    x, _, packed, bias = case.make(0.9, torch.float64)

    def run(x, values, bias):
        weight = dataclasses.replace(packed, values=values)
        return kernelwise_conv2d(x, weight, bias, activation=activation, pool=pool, **case.options)

    inputs = [t.requires_grad_() for t in (x, packed.values, bias)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)  # one random direction each


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_the_reference(dtype):
    case = CASES["stride 2"]
    x, weight, packed, bias = case.make(0.5, dtype)
    got = kernelwise_conv2d(x, packed, bias, activation="relu", pool=2, **case.options)
    assert got.dtype == dtype
    close = {torch.float64: 1e-12, torch.float16: 0.02}[dtype]
    want = expected(x, weight, bias, case, "relu", 2)
    torch.testing.assert_close(got.double(), want, rtol=close, atol=close)


def test_autocast_casts_the_input_back():
    case = Case()
    x, weight, packed, bias = case.make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kernelwise_conv2d(x.bfloat16(), packed, bias, **case.options)
    assert got.dtype == torch.float32
    assert_close(got, expected(x.bfloat16(), weight, bias, case), 54)


@pytest.mark.parametrize("batch", [1, 3, 8, 17])
def test_threads_change_nothing(batch):
    case = Case(channels=24, filters=30, size=(20, 20), batch=batch)
    x, _, packed, bias = case.make()
    grad, index = torch.randn(batch, 30, 20, 20), (packed.filter_offsets, packed.channels)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            (
                kernelwise_conv2d(x, packed, bias, **case.options),
                OPS.kernelwise_conv2d_grad_x(grad, packed.values, *index, x.shape, *case.settings),
                OPS.kernelwise_conv2d_grad_values(grad, x, *index, case.kernel, *case.settings),
            )
        )
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(4, 4), (7, 8), (5, 20)])
def test_threads_change_nothing_in_any_layout(size, layout):
    case = Case(channels=40, filters=30, size=size, batch=13)
    x, _, packed, bias = case.make()
    x, before, results = lay_out(x, layout), torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(kernelwise_conv2d(x, packed, bias, **case.options))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_kernels_agree_with_the_references(case):
    x, weight, packed, bias = case.make()
    index = (packed.filter_offsets, packed.channels)
    grad = torch.randn_like(F.conv2d(x, weight, **case.options))
    close = {"rtol": 1e-4, "atol": 1e-4}
    args = (x, packed.values, *index, bias, *case.settings, True, 1, 0)
    got, want = OPS.kernelwise_conv2d(*args), reference.kernelwise_conv2d(*args)
    torch.testing.assert_close(got, want, **close)
    args = (grad, packed.values, *index, x.shape, *case.settings)
    got, want = OPS.kernelwise_conv2d_grad_x(*args), reference.kernelwise_conv2d_grad_x(*args)
    torch.testing.assert_close(got, want, **close)
    args = (grad, x, *index, case.kernel, *case.settings)
    got = OPS.kernelwise_conv2d_grad_values(*args)
    torch.testing.assert_close(got, reference.kernelwise_conv2d_grad_values(*args), **close)


def test_reference_works_through_its_batches_in_parts(monkeypatch):
    case = Case(batch=5)
    x, weight, packed, bias = case.make()
    monkeypatch.setattr("liveweight.reference.parts._CHUNK", 2 * packed.channels.numel() * 99)
    index = (packed.filter_offsets, packed.channels)
    got = reference.kernelwise_conv2d(x, packed.values, *index, bias, *case.settings, False, 1, 0)
    assert_close(got, expected(x, weight, bias, case), 54)
    grad = torch.randn_like(got)
    got = reference.kernelwise_conv2d_grad_x(grad, packed.values, *index, x.shape, *case.settings)
    want = torch.nn.grad.conv2d_input(x.shape, weight.double(), grad.double(), padding=1)
    assert_close(got, want, 45)
    got = reference.kernelwise_conv2d_grad_values(grad, x, *index, (3, 3), *case.settings)
    want = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    assert_close(got, want[(weight != 0).flatten(2).any(2)], 495)


@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(batch):
    case = Case(stride=(2, 1), batch=batch)
    x, weight, packed, bias = case.make()
    index = (packed.filter_offsets, packed.channels)
    grad = torch.randn(batch, 5, 5, 11)
    args = (x, packed.values, *index)
    opcheck(OPS.kernelwise_conv2d.default, (*args, bias, *case.settings, True, 2, 0))
    for layout in (1, 2):
        settings = (*case.settings, False, 1, layout)
        opcheck(OPS.kernelwise_conv2d.default, (*args, None, *settings))
    args = (grad, packed.values, *index, x.shape, *case.settings)
    opcheck(OPS.kernelwise_conv2d_grad_x.default, args)
    args = (grad, x, *index, case.kernel, *case.settings)
    opcheck(OPS.kernelwise_conv2d_grad_values.default, args)


@pytest.mark.parametrize("backend,pool", [("aot_eager", 1), ("aot_eager", 2), ("inductor", 2)])
def test_compile_forward_and_backward(backend, pool):
    case = Case()
    x, _, packed, bias = case.make()

    def run(x, values, bias):
        weight = Kernelwise(values, packed.filter_offsets, packed.channels, packed.shape)
        options = {"activation": "relu", "pool": pool} | case.options
        return kernelwise_conv2d(x * 2, weight, bias, **options) + 1

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
    yield (x, weight, bias), {}, TypeError, "weight must be formats.Kernelwise, got Tensor"
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
    yield (x, packed, 1.0), {}, TypeError, "bias must be a tensor or None, got float"
    yield (x, packed), {"stride": 0}, ValueError, "stride must be >= 1, got 0"
    yield (x, packed), {"padding": (1, -1)}, ValueError, r"padding must be >= 0, got \(1, -1\)"
    yield (x, packed), {"padding": "same"}, ValueError, "padding must be a whole number or two"
    yield (x, packed), {"dilation": (1, 1, 1)}, ValueError, "dilation must be a whole number or two"
    yield (x, packed), {"dilation": 1.5}, ValueError, "dilation must be a whole number or two"
    yield (x, packed), {"groups": 2}, ValueError, "5 filters do not form groups=2"
    yield (x, packed), {"groups": 0}, ValueError, "5 filters do not form groups=0"
    yield (x, packed), {"groups": 5}, ValueError, r"expected x \[B, 30, H, W\]"
    yield (x, packed), {"activation": "gelu"}, ValueError, "None or 'relu', got 'gelu'"
    yield (x, packed), {"layout": "NHWC"}, ValueError, "layout must be 'contiguous', .*, got 'NHWC'"
    yield (x, packed), {"layout": 1}, ValueError, "layout must be 'contiguous', .* or None, got 1"
    yield (x, packed), {"pool": 0}, ValueError, "pool must be a whole number >= 1, got 0"
    yield (x, packed), {"pool": 1.5}, ValueError, "pool must be a whole number >= 1, got 1.5"
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
        kernelwise_conv2d(*args, **options)


def test_launchers_guard_memory():
    case = Case(padding=(0, 0))
    x, _, packed, bias = case.make(1.0)
    values, offsets, channels = packed.values, packed.filter_offsets, packed.channels

    def refuses(
        message,
        x=x,
        values=values,
        offsets=offsets,
        bias=bias,
        settings=case.settings,
        pool=1,
        layout=0,
    ):
        with pytest.raises(RuntimeError, match=message):
            settings = (*settings, False, pool, layout)
            OPS.kernelwise_conv2d(x, values, offsets, channels, bias, *settings)

    refuses(r"channels must be in \[0, 4\)", x=x[:, :4].contiguous())
    refuses("expected x contiguous, channels last or batch last", x=x.flip(0).mT)
    refuses("expected x .* float32", x=x.double())
    refuses("layout must be 0, 1 or 2, got 3", layout=3)
    refuses("must rise from 0", offsets=offsets.flip(0))
    refuses("expected 30 kernels, got 29", values=values[:29])
    refuses(r"expected bias \[5\]", bias=bias[:4])
    refuses("is smaller than the kernel", x=x[:, :, :2].contiguous())
    refuses("stride must be two numbers >= 1", settings=((0, 1), *case.settings[1:]))
    refuses("do not form 4 groups", settings=(*case.settings[:3], 4))
    refuses("cannot pool 7 x 9 by 8", pool=8)
    with pytest.raises(RuntimeError, match="expected grad"):
        args = (x, values, offsets, channels, x.shape, *case.settings)
        OPS.kernelwise_conv2d_grad_x(*args)
    with pytest.raises(RuntimeError, match="expected grad"):
        args = (x, x, offsets, channels, (3, 3), *case.settings)
        OPS.kernelwise_conv2d_grad_values(*args)
