"""delta_linear's reference against float64 dense layers: values, edges, tracing, messages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from liveweight import ops, reference
from liveweight.formats import Delta, Unstructured
from liveweight.formats.delta import is_filler
from liveweight.ops import delta_linear, delta_to_dense
from liveweight.ops.activation import activation_code

OPS = torch.ops.liveweight


def make(M: int, N: int, K: int, density: float = 0.1, dtype=torch.float32, **layout):
    """Return (x, dense weight with zeros, its format, bias)."""
    weight = torch.randn(N, K, dtype=dtype) * (torch.rand(N, K) < density)
    packed = Delta.from_dense(weight, **layout)
    return torch.randn(M, K, dtype=dtype), weight, packed, torch.randn(N, dtype=dtype)


def index_of(packed: Delta) -> tuple:
    index = (packed.deltas, packed.starts, packed.order, packed.offsets)
    return *index, packed.shape, packed.layout


def expected(x, weight, bias, activation=None):
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return reference.apply_activation(y, activation_code(activation))


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("M,N,K", [(1, 1, 1), (3, 17, 63), (9, 40, 2100), (70, 33, 300)])
def test_forward(M, N, K, activation):
    x, weight, packed, bias = make(M, N, K, dtype=torch.float64)
    for b in (None, bias):
        got = delta_linear(x, packed, b, activation=activation)
        torch.testing.assert_close(got, expected(x, weight, b, activation))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_wide_and_rounded_once(dtype):
    x, weight, packed, bias = make(4, 20, 900, dtype=dtype)
    got = delta_linear(x, packed, bias, activation="gelu")
    assert got.dtype == dtype
    want = expected(x, weight, bias, "gelu")
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=2e-5)


@pytest.mark.parametrize("shape", [(13,), (2, 3, 13), (0, 13), (2, 0, 13)])
def test_any_rank(shape):
    _, weight, packed, bias = make(1, 6, 13, 0.5)
    x = torch.randn(shape)
    got = delta_linear(x, packed, bias)
    assert got.shape == (*shape[:-1], 6)
    torch.testing.assert_close(got.double(), expected(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("N,K", [(0, 4), (4, 0)])
def test_empty_sides(N, K):
    x, _, packed, bias = make(3, N, K)
    got = delta_linear(x, packed, bias)
    assert got.shape == (3, N) and torch.equal(got, bias.expand(3, N))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_removed_weights_stop_nan_and_inf(poison):
    x, weight, packed, bias = make(2, 30, 400, 0.02, bits=4)
    x[:] = poison
    x[:, weight[3] != 0] = 1.0
    got = delta_linear(x, packed, bias)
    torch.testing.assert_close(got[:, 3], (weight[3].sum() + bias[3]).expand(2))
    assert bool((~got[:, (weight != 0)[:, weight[3] == 0].any(1)].isfinite()).all())


@pytest.mark.parametrize("M", [1, 7, 40])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh"])
def test_gradients(M, activation):
    x, weight, packed, bias = make(M, 17, 90, 0.1, torch.float64, bits=4, lanes=4)
    inputs = [x, packed.values, bias]
    for tensor in inputs:
        tensor.requires_grad_()
    grad = torch.randn(M, 17, dtype=torch.float64)
    delta_linear(x, packed, bias, activation=activation).backward(grad)
    dense = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    expected(*dense, activation).backward(grad)
    index, row, column = packed.entries()
    torch.testing.assert_close(x.grad, dense[0].grad)
    torch.testing.assert_close(bias.grad, dense[2].grad)
    torch.testing.assert_close(packed.values.grad[index], dense[1].grad[row, column])
    rest = torch.ones_like(packed.values, dtype=torch.bool).index_fill(0, index, False)
    fillers = packed.values.grad[rest]
    assert not fillers.any() and not torch.signbit(fillers).any()


def test_gradcheck():
    x, _, packed, bias = make(3, 5, 20, 0.3, torch.float64, bits=4, lanes=2)
    index = packed.entries()[0]

    def run(x, kept, bias):
        values = packed.values.index_put((index,), kept)
        return delta_linear(x, dataclasses.replace(packed, values=values), bias)

    inputs = [t.detach().requires_grad_() for t in (x, packed.values[index], bias)]
    assert torch.autograd.gradcheck(run, inputs)


def test_fillers_stay_fillers_while_training():
    x, _, packed, _ = make(8, 17, 90, 0.05, bits=4)
    values = torch.nn.Parameter(packed.values.clone())
    before = is_filler(values)
    for optimizer in (torch.optim.SGD([values], 0.1, 0.9), torch.optim.AdamW([values], 0.01)):
        for _ in range(3):
            trained = dataclasses.replace(packed, values=values)
            optimizer.zero_grad()
            delta_linear(x, trained).square().sum().backward()
            optimizer.step()
    assert torch.equal(is_filler(values), before) and not torch.equal(values, packed.values)


def test_op_checks():
    x, _, packed, bias = make(3, 12, 50, 0.2, torch.bfloat16, lanes=4)
    opcheck(OPS.delta_linear, (x, packed.values, *index_of(packed), bias, 1))
    opcheck(OPS.delta_to_dense, (packed.values, *index_of(packed)))
    grad = torch.randn(3, 12, dtype=torch.bfloat16)
    opcheck(OPS.delta_linear_grad_values, (grad, x, packed.values, *index_of(packed)))


def test_compiles_whole():
    x, weight, packed, bias = make(3, 12, 50, 0.2)
    compiled = torch.compile(
        lambda v: delta_linear(v, packed, bias, activation="relu") + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x), delta_linear(x, packed, bias, activation="relu") + 1)


def test_to_dense_is_the_formats():
    _, weight, packed, _ = make(1, 12, 50, 0.2)
    assert torch.equal(delta_to_dense(packed), weight) and "delta_linear" in ops.__all__


def test_messages():
    x, weight, packed, bias = make(3, 12, 50, 0.2)
    for error, message, call in [
        (
            TypeError,
            "weight must be formats.Delta, got Unstructured",
            lambda: delta_linear(x, Unstructured.from_dense(weight)),
        ),
        (TypeError, "weight must be formats.Delta, got Tensor", lambda: delta_to_dense(weight)),
        (
            ValueError,
            r"expected x \[..., 50\], got \(3, 49\)",
            lambda: delta_linear(x[:, :49], packed),
        ),
        (
            TypeError,
            "expected x float32 like values, got float64",
            lambda: delta_linear(x.double(), packed),
        ),
        (
            ValueError,
            r"expected bias \[12\], got \(11,\)",
            lambda: delta_linear(x, packed, bias[:11]),
        ),
        (ValueError, "activation must be", lambda: delta_linear(x, packed, activation="tanh")),
    ]:
        with pytest.raises(error, match=message):
            call()
