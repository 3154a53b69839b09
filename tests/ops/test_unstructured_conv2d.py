"""unstructured_conv2d against float64 dense layers: values, layouts, edges, threads, tracing."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from sparse_convs import CASES, LAYOUTS, Case, assert_close, expected, lay_out, parts
from torch.library import opcheck

from liveweight.formats import UnstructuredKernels
from liveweight.ops import unstructured_conv2d

OPS = torch.ops.liveweight


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


@pytest.mark.parametrize("layout", ["contiguous", "batch_last"])
@pytest.mark.parametrize(
    "size,stride", [((32, 34), (1, 1)), ((27, 50), (1, 2)), ((31, 33), (2, 1))]
)
def test_planes_beyond_the_cache(layout, size, stride):
    case = Case(channels=70, filters=5, batch=17, size=size, stride=stride, padding=(1, 0))
    x, weight, packed, bias = case.make(0.1)
    for pool in (1, 2):
        got = unstructured_conv2d(lay_out(x, layout), packed, bias, pool=pool, **case.options)
        assert_close(got, expected(x, weight, bias, case, pool=pool), 630)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_the_reference(dtype):
    case = CASES["stride 2"]
    x, weight, packed, bias = case.make(0.5, dtype)
    got = unstructured_conv2d(x, packed, bias, activation="relu", pool=2, **case.options)
    assert got.dtype == dtype
    close = {torch.float64: 1e-12, torch.float16: 0.02}[dtype]
    want = expected(x, weight, bias, case, "relu", 2)
    torch.testing.assert_close(got.double(), want, rtol=close, atol=close)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", [1, 2])
def test_bfloat16_is_rounded_once(layout, pool):
    case = Case(channels=24, filters=18, batch=19)
    x, weight, packed, bias = case.make(0.5, torch.bfloat16)
    x = lay_out(x, layout)
    options = case.options | {"activation": "relu", "pool": pool}
    got = unstructured_conv2d(x, packed, bias, **options)
    assert got.dtype == torch.bfloat16
    assert got.stride() == lay_out(torch.empty(got.shape), layout).stride()
    want = expected(x, weight, bias, case, "relu", pool)
    assert bool(((got.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-4).all())


def test_bfloat16_gradients():
    case = Case(channels=24, filters=18, batch=3)
    x, weight, packed, bias = case.make(0.5, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (x, packed.values, bias)]
    y = unstructured_conv2d(
        leaves[0], dataclasses.replace(packed, values=leaves[1]), leaves[2], **case.options
    )
    grad = torch.randn_like(y)
    y.backward(grad)
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    F.conv2d(*wide, **case.options).backward(grad.double())
    wanted = [wide[0].grad, UnstructuredKernels.from_dense(wide[1].grad, weight != 0).values]
    for leaf, want in zip(leaves, [*wanted, wide[2].grad], strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        close = (leaf.grad.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-3
        assert bool(close.all())


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
