"""block_linear against float64 dense layers: values, gradients, edges, tracing, messages."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from liveweight import reference
from liveweight.formats import Block
from liveweight.ops import block_linear

OPS = torch.ops.liveweight
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh")


def make(M, N, K, block=(16, 16), density=0.3, dtype=torch.float32):
    """Return (x, dense weight with zeros, its format, bias)."""
    kept = torch.rand(-(-N // block[0]), -(-K // block[1])) < density
    kept = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:N, :K]
    weight = torch.randn(N, K, dtype=dtype) * kept
    packed = Block.from_dense(weight, block=block)
    return torch.randn(M, K, dtype=dtype), weight, packed, torch.randn(N, dtype=dtype)


def parts(packed):
    return packed.values, packed.row_offsets, packed.columns, packed.schedule


def expected(x, weight, bias, activation=None):
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if activation == "relu":
        return y.relu()
    if activation is None:
        return y
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def assert_close(got, want, terms: int):
    # Rounding of a float32 sum of `terms` products of unit normals.
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6 * max(terms, 1) ** 0.5)


def batch_last(x):
    return x.t().contiguous().t()


BLOCKS = [(16, 1), (8, 8), (8, 3), (4, 4), (16, 16), (32, 32), (64, 5), (5, 3), (24, 7), (1, 1)]
BATCHES = [1, 2, 3, 5, 7, 9, 16, 17, 24, 33, 45, 100]


@pytest.mark.parametrize("block", [*BLOCKS, (128, 128), (48, 16), (2, 16)])
@pytest.mark.parametrize("N,K", [(64, 96), (37, 75), (3, 2)])
def test_forward(N, K, block):
    for M in BATCHES:
        x, weight, packed, bias = make(M, N, K, block)
        want = expected(x, weight, bias)
        assert_close(block_linear(x, packed, bias), want, K)
        got = block_linear(batch_last(x), packed, bias, batch_last=True)
        assert got.t().is_contiguous()
        assert_close(got, want, K)
        assert_close(block_linear(x, packed, batch_last=True), expected(x, weight, None), K)


@pytest.mark.parametrize("M", [19, 47])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, M):
    x, weight, packed, bias = make(M, 70, 50, (8, 4))
    want = expected(x, weight, bias, activation)
    assert_close(block_linear(x, packed, bias, activation=activation), want, 50)
    assert_close(block_linear(x, packed, bias, activation=activation, batch_last=True), want, 50)


@pytest.mark.parametrize("M", [1, 5, 32])
def test_bfloat16_with_nothing_kept(M):
    x, weight, packed, bias = make(M, 19, 33, (8, 8), 0.0, torch.bfloat16)
    assert torch.equal(block_linear(x, packed, bias), bias.expand(M, 19))


def assert_rounded(got, want):
    # bfloat16 keeps 8 bits: half a unit in the last place, beside the error of the fp32 sum.
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("N,K", [(64, 96), (37, 75)])
def test_bfloat16_adds_in_fp32(N, K, block):
    for M in (0, 1, 2, 8, 9, 17, 32, 45, 100):
        x, weight, packed, bias = make(M, N, K, block, dtype=torch.bfloat16)
        want = expected(x, weight, bias, "relu")
        assert_rounded(block_linear(x, packed, bias, activation="relu"), want)
        got = block_linear(batch_last(x), packed, bias, activation="relu", batch_last=True)
        assert got.t().is_contiguous()
        assert_rounded(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_halves(dtype):
    x, weight, packed, bias = make(40, 37, 48, (8, 8), dtype=dtype)
    inputs = [t.requires_grad_() for t in (x, packed.values, bias)]
    grad = torch.randn(40, 37, dtype=dtype)
    block_linear(x, packed, bias).backward(grad)
    dense = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected(*dense).backward(grad.double())
    assert all(t.grad.dtype == dtype for t in inputs)
    close = {"rtol": 2**-8, "atol": 1e-2}
    torch.testing.assert_close(x.grad.double(), dense[0].grad, **close)
    got = dataclasses.replace(packed, values=packed.values.grad).to_dense()
    kept = dataclasses.replace(packed, values=torch.ones_like(packed.values)).to_dense() != 0
    torch.testing.assert_close(got.double(), dense[1].grad * kept, **close)


def test_pieces_of_long_rows():
    # A row of blocks holds more weights than one piece: 200 blocks of 256.
    x, weight, packed, bias = make(40, 40, 3200, (16, 16), 0.9)
    assert_close(block_linear(x, packed, bias), expected(x, weight, bias), 3200)
    x, weight, packed, bias = make(40, 150, 300, (128, 128), 1.0)
    assert_close(block_linear(x, packed, bias), expected(x, weight, bias), 300)


def test_samples_beyond_the_cache_are_packed_in_parts():
    # 256 K numbers are packed at a time: 87 samples of 3000.
    x, weight, packed, bias = make(201, 40, 3000, (8, 8), 0.1)
    assert_close(block_linear(x, packed, bias), expected(x, weight, bias), 3000)


@pytest.mark.parametrize("block", [(16, 16), (8, 8), (5, 3)])
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("M", [0, 1, 5, 70])
def test_nothing_and_everything_kept(M, density, block):
    x, weight, packed, bias = make(M, 19, 33, block, density)
    assert_close(block_linear(x, packed, bias), expected(x, weight, bias), 33)


@pytest.mark.parametrize("N,K", [(0, 4), (4, 0)])
def test_empty_sides(N, K):
    for M in (1, 3):
        x, _, packed, bias = make(M, N, K)
        got = block_linear(x, packed, bias)
        assert got.shape == (M, N) and torch.equal(got, bias.expand(M, N))


@pytest.mark.parametrize("shape", [(13,), (2, 3, 13), (0, 13), (2, 0, 13), (1, 1, 1, 13)])
def test_any_rank(shape):
    _, weight, packed, bias = make(1, 6, 13, (4, 4))
    x = torch.randn(shape)
    got = block_linear(x, packed, bias)
    assert got.shape == (*shape[:-1], 6)
    assert_close(got, expected(x, weight, bias), 13)


def test_non_contiguous():
    _, weight, packed, bias = make(1, 6, 14, (4, 4))
    for x in (torch.randn(14, 9).t(), torch.randn(9, 28)[:, ::2], torch.randn(3, 14, 2).mT):
        assert not x.is_contiguous()
        assert_close(block_linear(x, packed, bias), expected(x, weight, bias), 14)


@pytest.mark.parametrize("M", [1, 4, 20])
def test_removed_blocks_stop_nan(M):
    x, weight, packed, bias = make(M, 64, 64, (8, 8), 0.4)
    x[:, 3] = float("nan")
    got = block_linear(x, packed, bias)
    reached = (weight[:, 3] != 0).reshape(8, 8).any(1).repeat_interleave(8)
    assert bool(got[:, ~reached].isfinite().all()) and bool(got[:, reached].isnan().all())


@pytest.mark.parametrize("block", [(16, 16), (8, 8), (16, 1), (5, 3), (32, 32)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_gradients(block, activation):
    for M in (1, 5, 40):
        x, weight, packed, bias = make(M, 37, 90, block)
        inputs = [x, packed.values, bias]
        for tensor in inputs:
            tensor.requires_grad_()
        grad = torch.randn(M, 37)
        block_linear(x, packed, bias, activation=activation).backward(grad)
        dense = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        expected(*dense, activation).backward(grad.double())
        assert_close(x.grad, dense[0].grad, 37)
        kept = dataclasses.replace(packed, values=torch.ones_like(packed.values)).to_dense() != 0
        got = dataclasses.replace(packed, values=packed.values.grad)
        assert_close(got.to_dense(), dense[1].grad * kept, M)
        assert got.to_dense().count_nonzero() == got.values.count_nonzero()  # none in the padding
        assert_close(bias.grad, dense[2].grad, M)


def test_gradients_of_many_samples():
    x, weight, packed, _ = make(1100, 20, 24, (8, 8))
    grad = torch.randn(1100, 20)
    got = OPS.block_linear_grad_values(grad, x, *parts(packed)[1:], [8, 8])
    got = dataclasses.replace(packed, values=got).to_dense()
    assert_close(got, (grad.double().t() @ x.double()) * (weight != 0), 1100)
    got = OPS.block_linear_grad_x(grad, *parts(packed), [20, 24])
    assert_close(got, grad.double() @ weight.double(), 20)


def test_gradients_of_batch_last():
    x, weight, packed, bias = make(9, 20, 24, (8, 8))
    x = batch_last(x).requires_grad_()
    block_linear(x, packed, bias, batch_last=True).square().sum().backward()
    dense = x.detach().double().requires_grad_()
    expected(dense, weight, bias).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), dense.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
def test_only_the_wanted_gradient(wanted):
    x, _, packed, bias = make(6, 9, 11, (4, 4))
    tensors = {"x": x, "values": packed.values, "bias": bias}
    tensors[wanted].requires_grad_()
    block_linear(x, packed, bias).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is not None} == {wanted}


def test_gradients_of_an_empty_batch_are_zero():
    x, _, packed, bias = make(0, 9, 11, (4, 4))
    packed.values.requires_grad_()
    block_linear(x.requires_grad_(), packed, bias.requires_grad_()).sum().backward()
    assert x.grad.shape == (0, 11) and not packed.values.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradcheck_in_float64(activation):
    x, _, packed, bias = make(4, 5, 6, (2, 2), 0.5, torch.float64)
    values = packed.values.requires_grad_()

    def run(x, values, bias):
        weight = dataclasses.replace(packed, values=values)
        return block_linear(x, weight, bias, activation=activation)[:, :4]

    assert torch.autograd.gradcheck(
        run, (x.requires_grad_(), values, bias.requires_grad_()), atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_the_reference(dtype):
    x, weight, packed, bias = make(5, 8, 12, (4, 4), 0.6, dtype)
    got = block_linear(x, packed, bias, activation="relu")
    assert got.dtype == dtype
    close = {torch.float64: 1e-12, torch.float16: 0.02}[dtype]
    want = expected(x, weight, bias, "relu")
    torch.testing.assert_close(got.double(), want, rtol=close, atol=close)


def test_autocast_casts_the_input_back():
    x, weight, packed, bias = make(5, 8, 12, (4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = block_linear(x.bfloat16(), packed, bias)
    assert got.dtype == torch.float32
    assert_close(got, expected(x.bfloat16(), weight, bias), 12)


@pytest.mark.parametrize("block", [(16, 16), (8, 8), (16, 1)])
@pytest.mark.parametrize("M", [1, 6, 40, 300])
def test_threads_change_nothing(M, block):
    x, _, packed, bias = make(M, 300, 700, block, 0.5)
    grad, index = torch.randn(M, 300), parts(packed)[1:]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            (
                block_linear(x, packed, bias),
                OPS.block_linear_grad_x(grad, *parts(packed), [300, 700]),
                OPS.block_linear_grad_values(grad, x, *index, list(block)),
            )
        )
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_two_callers_at_once():
    x, _, packed, bias = make(33, 200, 300, (16, 16), 0.5)
    want = block_linear(x, packed, bias)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(block_linear, x, packed, bias) for _ in range(40)]
    assert all(torch.equal(call.result(), want) for call in calls)


def test_reference_works_through_its_batches_in_parts(monkeypatch):
    x, weight, packed, bias = make(20, 30, 50, (8, 8))
    grad, index = torch.randn(20, 30), parts(packed)[1:]
    monkeypatch.setattr("liveweight.reference.parts._CHUNK", 3 * packed.values.shape[0] * 8)
    got = reference.block_linear(x, *parts(packed), packed.shape, bias, 0, False)
    assert_close(got, expected(x, weight, bias), 50)
    got = reference.block_linear_grad_x(grad, *parts(packed), packed.shape)
    assert_close(got, grad.double() @ weight.double(), 30)
    got = dataclasses.replace(
        packed, values=reference.block_linear_grad_values(grad, x, *index, (8, 8))
    )
    assert_close(got.to_dense(), (grad.double().T @ x.double()) * (weight != 0), 20)


@pytest.mark.parametrize("M", [0, 5])
def test_opcheck(M):
    x, _, packed, bias = make(M, 8, 12, (4, 4))
    grad, index, size = torch.randn(M, 8), parts(packed)[1:], [8, 12]
    opcheck(OPS.block_linear.default, (x, *parts(packed), size, bias, 1, False))
    opcheck(OPS.block_linear.default, (x, *parts(packed), size, None, 0, True))
    halves = [t.bfloat16() for t in (x, packed.values, bias)]
    opcheck(OPS.block_linear.default, (*halves[:2], *index, size, halves[2], 1, False))
    opcheck(OPS.block_linear_grad_x.default, (grad, *parts(packed), size))
    opcheck(OPS.block_linear_grad_values.default, (grad, x, *index, [4, 4]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_forward_and_backward(backend):
    x, _, packed, bias = make(5, 8, 12, (4, 4))

    def run(x, values, bias):
        weight = Block(values, packed.row_offsets, packed.columns, packed.shape)
        return block_linear(x * 2, weight, bias, activation="gelu") + 1

    grads = []
    for function in (run, torch.compile(run, fullgraph=True, backend=backend)):
        inputs = [t.detach().clone().requires_grad_() for t in (x, packed.values, bias)]
        y = function(*inputs)
        y.pow(2).sum().backward()
        grads.append((y.detach(), *(t.grad for t in inputs)))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)


def bad_calls():
    x, _, packed, bias = make(2, 5, 6, (2, 2), 1.0)
    yield (x, torch.ones(5, 6), bias), {}, TypeError, "weight must be formats.Block, got Tensor"
    yield ([1.0], packed, bias), {}, TypeError, "x must be a tensor, got list"
    yield (x[:, :5], packed, bias), {}, ValueError, r"expected x \[..., 6\], got \(2, 5\)"
    yield (x.double(), packed, bias), {}, TypeError, "expected x float32 like values, got float64"
    yield (x, packed, bias[:4]), {}, ValueError, r"expected bias \[5\], got \(4,\)"
    yield (x, packed, bias.double()), {}, TypeError, "expected bias float32, got float64"
    yield (x, packed, 1.0), {}, TypeError, "bias must be a tensor or None, got float"
    yield (x, packed, bias), {"activation": "elu"}, ValueError, "activation must be"
    yield (x.to("meta"), packed, bias), {}, ValueError, "x is on meta, expected cpu like values"
    yield (x, packed, bias.to("meta")), {}, ValueError, "bias is on meta, expected cpu like values"
    yield (x[0], packed, bias), {"batch_last": True}, ValueError, "batch_last needs"


@pytest.mark.parametrize("case", range(len(list(bad_calls()))))
def test_messages(case):
    args, options, error, message = list(bad_calls())[case]
    with pytest.raises(error, match=message):
        block_linear(*args, **options)


def test_launchers_guard_memory():
    x, _, packed, bias = make(2, 5, 6, (2, 2), 1.0)
    values, offsets, columns, schedule = parts(packed)

    def refuses(message, *args):
        with pytest.raises(RuntimeError, match=message):
            OPS.block_linear(*args, 0, False)

    refuses("contiguous or batch last", torch.ones(2, 12)[:, ::2], *parts(packed), [5, 6], bias)
    refuses(r"x \[M, K\] float32", x.double(), *parts(packed), [5, 6], bias)
    refuses("values has the wrong dtype", x.bfloat16(), *parts(packed), [5, 6], bias.bfloat16())
    refuses("bias has the wrong dtype", x, *parts(packed), [5, 6], bias.bfloat16())
    refuses("must rise from 0", x, values, offsets.flip(0), columns, schedule, [5, 6], bias)
    refuses("columns must be in", x[:, :4].contiguous(), *parts(packed), [5, 4], bias)
    refuses("expected 4 row_offsets|expected 5 row_offsets", x, *parts(packed), [8, 6], bias)
    refuses("expected 9 blocks", x, values[1:], offsets, columns, schedule, [5, 6], bias)
    refuses(r"expected bias \[5\]", x, *parts(packed), [5, 6], bias[:4])
    refuses(
        "expected blocks of 1 to 128",
        x,
        values.new_zeros(9, 0, 2),
        *parts(packed)[1:],
        [5, 6],
        None,
    )
    with pytest.raises(RuntimeError, match="expected grad"):
        OPS.block_linear_grad_x(x, *parts(packed), [5, 6])
    with pytest.raises(RuntimeError, match="expected grad"):
        OPS.block_linear_grad_values(torch.ones(3, 5), x, *parts(packed)[1:], [2, 2])


@pytest.mark.parametrize("block", [(16, 1), (8, 4), (32, 16)], ids=str)
def test_gradients_at_dense_cost_equal_the_reference(block):
    from liveweight.ops.block_linear import grad_values_by_dense, grad_x_by_dense

    weight = torch.randn(37, 29, dtype=torch.float64)
    weight[:, ::3] = 0
    packed = Block.from_dense(weight, block=block)
    x, grad = torch.randn(5, 29, dtype=torch.float64), torch.randn(5, 37, dtype=torch.float64)
    index = (packed.row_offsets, packed.columns)
    args = (*index, packed.schedule)
    want = reference.block_linear_grad_x(grad, packed.values, *args, packed.shape)
    assert torch.allclose(grad_x_by_dense(grad, packed.values, *index, packed.shape), want)
    want = reference.block_linear_grad_values(grad, x, *args, block)
    assert torch.allclose(grad_values_by_dense(grad, x, *index, block), want)
