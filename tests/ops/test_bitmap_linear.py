"""bitmap_linear against float64 dense layers: values, gradients, edges, tracing, messages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from liveweight import reference
from liveweight.formats import Bitmap, Block
from liveweight.ops import bitmap_linear
from liveweight.ops.activation import activation_code

OPS = torch.ops.liveweight


def make(M: int, N: int, K: int, density: float = 0.4, dtype=torch.float32):
    """Return (x, dense weight with zeros, its format, bias)."""
    weight = (torch.randn(N, K) * (torch.rand(N, K) < density)).to(dtype)
    bias = torch.randn(N).to(dtype)
    return torch.randn(M, K).to(dtype), weight, Bitmap.from_dense(weight), bias


def expected(x, weight, bias, activation=None):
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return reference.apply_activation(y, activation_code(activation))


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("N,K", [(1, 1), (17, 63), (33, 129), (70, 300)])
@pytest.mark.parametrize("M", [1, 5, 64, 65])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_forward(M, N, K, dtype):
    x, weight, packed, bias = make(M, N, K, dtype=dtype)
    for b in (None, bias):
        for activation in (None, "relu", "gelu", "gelu_tanh"):
            got = bitmap_linear(x, packed, b, activation=activation)
            assert got.dtype == dtype
            want = expected(x, weight, b, activation)
            tolerance = TOLERANCES[dtype]
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * 2)


@pytest.mark.parametrize("size", [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_empty_sizes(size):
    x, weight, packed, bias = make(*size)
    torch.testing.assert_close(bitmap_linear(x, packed, bias).double(), expected(x, weight, bias))


def test_all_zero_and_all_kept_and_leading_dimensions():
    for density in (0.0, 1.0):
        x, weight, packed, bias = make(6, 40, 140, density)
        got = bitmap_linear(x.reshape(2, 3, 140), packed, bias).reshape(6, 40)
        torch.testing.assert_close(got, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    one = bitmap_linear(x[0], packed, bias)
    torch.testing.assert_close(one, F.linear(x[0], weight, bias), rtol=1e-5, atol=1e-5)


def test_input_that_is_not_contiguous():
    x, weight, packed, _ = make(6, 40, 140)
    strided = x.t().contiguous().t()
    torch.testing.assert_close(bitmap_linear(strided, packed), x @ weight.t())


def test_gradients_are_those_of_a_dense_layer():
    x, weight, packed, bias = make(5, 40, 140, dtype=torch.float64)
    for activation in (None, "relu", "gelu", "gelu_tanh"):
        leaves = [t.clone().requires_grad_() for t in (x, packed.values, bias)]
        dense = [t.clone().requires_grad_() for t in (x, weight, bias)]
        trained = dataclasses.replace(packed, values=leaves[1])
        y = bitmap_linear(leaves[0], trained, leaves[2], activation=activation)
        y.backward(grad := torch.randn_like(y))
        expected(*dense, activation).backward(grad)
        torch.testing.assert_close(leaves[0].grad, dense[0].grad)
        torch.testing.assert_close(leaves[2].grad, dense[2].grad)
        got = dataclasses.replace(packed, values=leaves[1].grad).to_dense()
        torch.testing.assert_close(got, dense[1].grad * packed.mask())
        places = leaves[1].grad != 0
        assert int(places.sum()) <= int(packed.mask().sum())  # nothing behind a tile's last value


def test_gradcheck():
    x, _, packed, bias = make(2, 3, 5, 0.5, torch.float64)

    def run(x, values, bias):
        # Behind the last value of the tile there is only filling, without a gradient.
        whole = torch.cat([values, packed.values.new_zeros(packed.values.numel() - len(values))])
        return bitmap_linear(x, dataclasses.replace(packed, values=whole), bias, activation="gelu")

    kept = packed.values[: int(packed.mask().sum())].clone()
    leaves = [t.requires_grad_() for t in (x, kept, bias)]
    assert torch.autograd.gradcheck(run, leaves)


def test_gradients_only_where_they_are_wanted():
    x, _, packed, bias = make(3, 20, 30)
    y = bitmap_linear(x.requires_grad_(), packed, bias)
    y.sum().backward()
    assert x.grad is not None and packed.values.grad is None and bias.grad is None
    assert not bitmap_linear(x.detach(), packed, bias).requires_grad


def test_nan_and_inf_go_where_a_dense_layer_takes_them():
    for poison in (float("nan"), float("inf")):
        x, weight, packed, _ = make(4, 40, 140)
        x[2, 7] = poison
        got, want = bitmap_linear(x, packed), F.linear(x, weight)
        assert torch.equal(got.isnan(), want.isnan()) and bool(got[[0, 1, 3]].isfinite().all())


def parts(packed):
    return packed.bits, packed.offsets, packed.shape, packed.most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, _, packed, bias = make(3, 20, 140, dtype=dtype)
    grad = torch.randn(3, 20).to(dtype)
    opcheck(OPS.bitmap_linear.default, (x, packed.values, *parts(packed), bias, 2))
    opcheck(OPS.bitmap_linear.default, (x, packed.values, *parts(packed), None, 0))
    opcheck(OPS.bitmap_to_dense.default, (packed.values, *parts(packed)))
    opcheck(OPS.bitmap_linear_grad_values.default, (grad, x, packed.values, *parts(packed)))


def test_compiles_whole_with_gradients():
    x, _, packed, bias = make(3, 20, 140)
    leaves = [t.clone().requires_grad_() for t in (x, packed.values, bias)]

    def run(x, values, bias):
        weight = dataclasses.replace(packed, values=values)
        return bitmap_linear(x, weight, bias, activation="gelu")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y, z = run(*leaves), compiled(*leaves)
    torch.testing.assert_close(z, y)
    grads = torch.autograd.grad(y.sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), leaves), grads)


def test_autocast_casts_x_as_dense_layers_do():
    x, weight, packed, bias = make(3, 20, 30, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = bitmap_linear(x.float(), packed, bias)
    assert torch.equal(got, bitmap_linear(x, packed, bias))


def test_messages():
    x, weight, packed, bias = make(3, 20, 30)
    for error, message, args in [
        (TypeError, "formats.Bitmap, got Tensor", (x, weight)),
        (TypeError, "formats.Bitmap, got Block", (x, Block.from_dense(weight))),
        (ValueError, r"expected x \[..., 30\]", (x[:, 1:], packed)),
        (TypeError, "expected x float32", (x.double(), packed)),
        (TypeError, "x must be a tensor", ([1.0], packed)),
        (ValueError, r"expected bias \[20\]", (x, packed, bias[1:])),
        (TypeError, "expected bias float32", (x, packed, bias.double())),
    ]:
        with pytest.raises(error, match=message):
            bitmap_linear(*args)
    with pytest.raises(ValueError, match="activation"):
        bitmap_linear(x, packed, activation="tanh")
