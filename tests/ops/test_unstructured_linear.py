"""unstructured_linear against float64 dense layers: values, gradients, edges, tracing, messages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from liveweight import reference
from liveweight.formats import Unstructured
from liveweight.ops import unstructured_linear
from liveweight.ops.activation import activation_code

OPS = torch.ops.liveweight
NAMES = ("columns", "segments", "offsets", "bits", "tile")


def index_of(packed):
    """Return the index arguments of the gradients."""
    return packed.columns, packed.segments, packed.offsets, packed.tile


def places_of(packed):
    """Return the index arguments of the forward op."""
    return packed.columns, packed.segments, packed.offsets, packed.bits, packed.tile


def make(M: int, N: int, K: int, density: float = 0.3, dtype=torch.float32):
    """Return (x, dense weight with zeros, its format, bias)."""
    weight = torch.randn(N, K, dtype=dtype) * (torch.rand(N, K) < density)
    bias = torch.randn(N, dtype=dtype)
    return torch.randn(M, K, dtype=dtype), weight, Unstructured.from_dense(weight), bias


def expected(x, weight, bias, activation=None):
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return reference.apply_activation(y, activation_code(activation))


def assert_close(got, want, terms: int):
    # Rounding of a float32 sum of `terms` products of unit normals.
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6 * max(terms, 1) ** 0.5)


SIZES = [(1, 1), (7, 5), (17, 63), (129, 200), (40, 2100)]
BATCHES = [1, 2, 3, 7, 8, 9, 16, 31, 33, 64, 65, 100, 129]


@pytest.mark.parametrize("N,K", SIZES)
@pytest.mark.parametrize("M", BATCHES)
def test_forward(M, N, K):
    x, weight, packed, bias = make(M, N, K)
    for b in (None, bias):
        for activation in (None, "relu"):
            got = unstructured_linear(x, packed, b, activation=activation)
            assert_close(got, expected(x, weight, b, activation), K)


@pytest.mark.parametrize("tile", [(1, 1), (16, 32), (7, 300), (256, 256), (256, 32768)])
@pytest.mark.parametrize("M", [2, 5, 70])
def test_any_tile(M, tile):
    x, weight, _, bias = make(M, 150, 700, 0.2)
    packed = Unstructured.from_dense(weight, tile=tile)
    for activation in ("gelu", "gelu_tanh"):
        got = unstructured_linear(x, packed, bias, activation=activation)
        assert_close(got, expected(x, weight, bias, activation), 700)


@pytest.mark.parametrize("M", [0, 1, 3, 5, 64, 70])
def test_batch_last_is_only_another_layout(M):
    x, weight, packed, bias = make(M, 37, 50)
    want = unstructured_linear(x, packed, bias, activation="relu")
    turned = x.t().contiguous().t()
    for given in (x, turned):
        for last in (False, True):
            got = unstructured_linear(given, packed, bias, activation="relu", batch_last=last)
            assert torch.equal(got, want)
            assert (got.t() if last else got).is_contiguous()


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("M", [0, 1, 5, 70])
def test_nothing_and_everything_kept(M, density):
    x, weight, packed, bias = make(M, 19, 33, density)
    assert_close(unstructured_linear(x, packed, bias), expected(x, weight, bias), 33)


@pytest.mark.parametrize("N,K", [(0, 4), (4, 0)])
def test_empty_sides(N, K):
    x, weight, packed, bias = make(3, N, K)
    got = unstructured_linear(x, packed, bias)
    assert got.shape == (3, N) and torch.equal(got, bias.expand(3, N))


@pytest.mark.parametrize("shape", [(13,), (2, 3, 13), (0, 13), (2, 0, 13), (1, 1, 1, 13)])
def test_any_rank(shape):
    _, weight, packed, bias = make(1, 6, 13)
    x = torch.randn(shape)
    got = unstructured_linear(x, packed, bias)
    assert got.shape == (*shape[:-1], 6)
    assert_close(got, expected(x, weight, bias), 13)


def test_non_contiguous():
    _, weight, packed, bias = make(1, 6, 14)
    for x in (torch.randn(14, 9).t(), torch.randn(9, 28)[:, ::2], torch.randn(3, 14, 2).mT):
        assert not x.is_contiguous()
        assert_close(unstructured_linear(x, packed, bias), expected(x, weight, bias), 14)


@pytest.mark.parametrize("M", [1, 4, 20])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_removed_weights_stop_nan_and_inf(M, poison):
    x, weight, packed, bias = make(M, 30, 40, 0.2)
    x[:, 3] = poison
    got = unstructured_linear(x, packed, bias, activation="relu")
    reached = weight[:, 3] != 0
    assert 0 < int(reached.sum()) < 30
    assert bool(got[:, ~reached].isfinite().all())
    clean = torch.cat([x[:, :3], x[:, 4:]], 1)
    rest = torch.cat([weight[:, :3], weight[:, 4:]], 1)
    assert_close(got[:, ~reached], expected(clean, rest, bias, "relu")[:, ~reached], 40)
    if poison != poison:
        assert bool(got[:, reached].isnan().all())


@pytest.mark.parametrize("M", [1, 5, 40, 200])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh"])
def test_gradients(M, activation):
    x, weight, packed, bias = make(M, 37, 90)
    inputs = [x, packed.values, bias]
    for tensor in inputs:
        tensor.requires_grad_()
    grad = torch.randn(M, 37)
    unstructured_linear(x, packed, bias, activation=activation).backward(grad)
    dense = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected(*dense, activation).backward(grad.double())
    assert_close(x.grad, dense[0].grad, 37)
    assert_close(packed.values.grad, dense[1].grad[packed.coordinates()], M)
    assert_close(bias.grad, dense[2].grad, M)


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
def test_only_the_wanted_gradient(wanted):
    x, weight, packed, bias = make(6, 9, 11)
    tensors = {"x": x, "values": packed.values, "bias": bias}
    tensors[wanted].requires_grad_()
    unstructured_linear(x, packed, bias).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is not None} == {wanted}


def test_gradients_of_an_empty_batch_are_zero():
    x, weight, packed, bias = make(0, 9, 11)
    packed.values.requires_grad_()
    x.requires_grad_()
    unstructured_linear(x, packed, bias.requires_grad_()).sum().backward()
    assert x.grad.shape == (0, 11) and not packed.values.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh"])
def test_gradcheck_in_float64(activation):
    x, _, packed, bias = make(4, 5, 6, 0.5, torch.float64)
    values = packed.values.requires_grad_()

    def run(x, values, bias):
        weight = dataclasses.replace(packed, values=values)
        return unstructured_linear(x, weight, bias, activation=activation)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), values, bias.requires_grad_()))


def test_second_derivative_is_refused():
    x, _, packed, bias = make(4, 5, 6)
    (grad,) = torch.autograd.grad(
        unstructured_linear(x.requires_grad_(), packed).pow(2).sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_the_reference(dtype):
    x, weight, packed, bias = make(5, 8, 12, 0.4, dtype)
    got = unstructured_linear(x, packed, bias, activation="relu")
    assert got.dtype == dtype
    close = {torch.float64: 1e-12, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(
        got.double(), expected(x, weight, bias, "relu"), rtol=close, atol=close
    )


def test_autocast_casts_the_input_back():
    x, weight, packed, bias = make(5, 8, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = unstructured_linear(x.bfloat16(), packed, bias)
    assert got.dtype == torch.float32
    assert_close(got, expected(x.bfloat16(), weight, bias), 12)


@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("M", [1, 6, 40, 300])
def test_threads_change_nothing(M, density):
    x, _, packed, bias = make(M, 300, 700, density)
    grad = torch.randn(M, 300)
    index = index_of(packed)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            (
                unstructured_linear(x, packed, bias),
                OPS.unstructured_linear_grad_x(grad, packed.values, *index, 700),
                OPS.unstructured_linear_grad_values(grad, x, *index),
            )
        )
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_kernels_agree_with_the_references():
    x, _, packed, bias = make(20, 30, 50)
    grad, index = torch.randn(20, 30), index_of(packed)
    args = (x, packed.values, *places_of(packed), 30, bias, 1, False)
    torch.testing.assert_close(OPS.unstructured_linear(*args), reference.unstructured_linear(*args))
    args = (grad, packed.values, *index, 50)
    torch.testing.assert_close(
        OPS.unstructured_linear_grad_x(*args), reference.unstructured_linear_grad_x(*args)
    )
    args = (grad, x, *index)
    torch.testing.assert_close(
        OPS.unstructured_linear_grad_values(*args),
        reference.unstructured_linear_grad_values(*args),
    )


def test_reference_works_through_its_batches_in_parts(monkeypatch):
    x, weight, packed, bias = make(20, 30, 50)
    grad, index = torch.randn(20, 30), index_of(packed)
    monkeypatch.setattr("liveweight.reference.parts._CHUNK", 3 * packed.values.numel())
    got = reference.unstructured_linear(x, packed.values, *places_of(packed), 30, bias, 0, False)
    assert_close(got, expected(x, weight, bias), 50)
    got = reference.unstructured_linear_grad_x(grad, packed.values, *index, 50)
    assert_close(got, grad.double() @ weight.double(), 30)
    got = reference.unstructured_linear_grad_values(grad, x, *index)
    assert_close(got, (grad.double().T @ x.double())[packed.coordinates()], 20)


@pytest.mark.parametrize("M", [0, 5])
def test_opcheck(M):
    x, _, packed, bias = make(M, 8, 12)
    grad, index = torch.randn(M, 8), index_of(packed)
    forward = (x, packed.values, *places_of(packed), 8)
    opcheck(OPS.unstructured_linear.default, (*forward, bias, 1, False))
    opcheck(OPS.unstructured_linear.default, (*forward, None, 2, True))
    opcheck(OPS.unstructured_linear_grad_x.default, (grad, packed.values, *index, 12))
    opcheck(OPS.unstructured_linear_grad_values.default, (grad, x, *index))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_forward_and_backward(backend):
    x, _, packed, bias = make(5, 8, 12)

    def run(x, values, bias):
        weight = dataclasses.replace(packed, values=values)
        return unstructured_linear(x * 2, weight, bias, activation="relu") + 1

    grads = []
    for function in (run, torch.compile(run, fullgraph=True, backend=backend)):
        inputs = [t.detach().clone().requires_grad_() for t in (x, packed.values, bias)]
        y = function(*inputs)
        y.pow(2).sum().backward()
        grads.append((y.detach(), *(t.grad for t in inputs)))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)


def bad_calls():
    x, _, packed, bias = make(2, 5, 6)
    half = dataclasses.replace(packed, values=packed.values.half())
    yield (
        (x, torch.ones(5, 6), bias),
        {},
        TypeError,
        "weight must be formats.Unstructured, got Tensor",
    )
    yield ([1.0], packed, bias), {}, TypeError, "x must be a tensor, got list"
    yield (x[:, :5], packed, bias), {}, ValueError, r"expected x \[..., 6\], got \(2, 5\)"
    yield (x.sum(), packed, bias), {}, ValueError, r"expected x \[..., 6\], got \(\)"
    yield (x.double(), packed, bias), {}, TypeError, "expected x float32 like values, got float64"
    yield (x.half(), half, bias), {}, TypeError, "expected bias float16, got float32"
    yield (x, packed, bias[:4]), {}, ValueError, r"expected bias \[5\], got \(4,\)"
    yield (x, packed, 1.0), {}, TypeError, "bias must be a tensor or None, got float"
    yield (x, packed, bias), {"activation": "tanh"}, ValueError, "'gelu_tanh', got 'tanh'"


@pytest.mark.parametrize("case", range(len(list(bad_calls()))))
def test_messages(case):
    args, options, error, message = list(bad_calls())[case]
    with pytest.raises(error, match=message):
        unstructured_linear(*args, **options)


def test_launchers_guard_memory():
    x, _, packed, bias = make(2, 5, 6, 1.0)
    given = dict(zip(NAMES, places_of(packed), strict=True))
    given |= {"x": x, "values": packed.values, "bias": bias}
    columns, segments, offsets = (given[n] for n in ("columns", "segments", "offsets"))

    def refuses(message, **broken):
        args = given | broken
        with pytest.raises(RuntimeError, match=message):
            OPS.unstructured_linear(**args, out_features=5, activation=0, batch_last=False)

    refuses("expected contiguous x", x=torch.randn(2, 12)[:, ::2])
    refuses("x has the wrong dtype", x=x.double())
    refuses("must rise from", offsets=offsets.flip(0))
    refuses("expected 30 values", values=packed.values[:29])
    refuses("columns has the wrong dtype", columns=columns.short())
    refuses("segments do not agree", segments=segments + 1)
    refuses("segments do not agree", segments=segments + torch.tensor([16, 0], dtype=torch.uint8))
    refuses("tile must be within", tile=(0, 256))
    refuses("expected offsets", tile=(16, 2))
    refuses(r"expected bias \[5\]", bias=bias[:4])
    with pytest.raises(RuntimeError, match="unknown activation 9"):
        OPS.unstructured_linear(x, packed.values, *places_of(packed), 5, bias, 9, False)


def test_launcher_refuses_offsets_beyond_the_end():
    x, _, packed, bias = make(2, 5, 300, 1.0)
    far = packed.offsets.clone()
    far[1] = 2**30  # though the last pair is right
    index = (packed.columns, packed.segments, far, packed.bits, packed.tile)
    with pytest.raises(RuntimeError, match="segments do not agree"):
        OPS.unstructured_linear(x, packed.values, *index, 5, bias, 0, False)
