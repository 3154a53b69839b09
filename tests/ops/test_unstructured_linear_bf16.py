"""unstructured_linear in bf16: added up in fp32, rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from liveweight import reference
from liveweight.formats import Unstructured
from liveweight.ops import unstructured_linear
from liveweight.ops.activation import activation_code

BF16 = torch.bfloat16


def make(M, N, K, density=0.3):
    weight = (torch.randn(N, K) * (torch.rand(N, K) < density)).to(BF16)
    return (
        torch.randn(M, K, dtype=BF16),
        weight,
        Unstructured.from_dense(weight),
        torch.randn(N, dtype=BF16),
    )


def assert_rounded_once(got, want, terms):
    """Within half a unit of bf16 of the exact number, and what summing in fp32 may add."""
    assert got.dtype is BF16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=3e-6 * max(terms, 1) ** 0.5)


@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("N,K", [(1, 1), (17, 63), (129, 200), (40, 700)])
@pytest.mark.parametrize("M", [0, 1, 2, 4, 5, 8, 31, 64, 70])
def test_forward(M, N, K, density):
    x, weight, packed, bias = make(M, N, K, density)
    for b in (None, bias):
        for activation in (None, "relu", "gelu"):
            want = F.linear(x.double(), weight.double(), None if b is None else b.double())
            want = reference.apply_activation(want, activation_code(activation))
            got = unstructured_linear(x, packed, b, activation=activation)
            assert_rounded_once(got, want, K)


@pytest.mark.parametrize("tile", [(1, 1), (7, 300), (256, 32768)])
@pytest.mark.parametrize("M", [2, 70])
def test_any_tile(M, tile):
    x, weight, _, _ = make(M, 50, 700, 0.5)
    packed = Unstructured.from_dense(weight, tile=tile)
    assert_rounded_once(unstructured_linear(x, packed), x.double() @ weight.double().T, 700)


@pytest.mark.parametrize("M", [1, 5, 64])
def test_layouts_and_threads_change_nothing(M):
    x, _, packed, bias = make(M, 300, 700)
    want = unstructured_linear(x, packed, bias)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for given in (x, x.t().contiguous().t()):
            got = unstructured_linear(given, packed, bias, batch_last=True)
            assert torch.equal(got, want) and got.t().is_contiguous()
    torch.set_num_threads(before)


def test_gradients():
    x, weight, packed, bias = make(40, 37, 90)
    inputs = [x, packed.values, bias]
    for tensor in inputs:
        tensor.requires_grad_()
    grad = torch.randn(40, 37, dtype=BF16)
    unstructured_linear(x, packed, bias).backward(grad)
    wanted = [
        grad.double() @ weight.double(),
        (grad.double().T @ x.detach().double())[packed.coordinates()],
        grad.double().sum(0),
    ]
    for tensor, want in zip(inputs, wanted, strict=True):
        assert tensor.grad.dtype is BF16
        torch.testing.assert_close(tensor.grad.double(), want, rtol=2**-7, atol=1e-2)


def test_opcheck_and_compile():
    x, _, packed, bias = make(5, 8, 12)
    index = (packed.columns, packed.segments, packed.offsets, packed.bits, packed.tile)
    args = (x, packed.values, *index, 8, bias, 1, False)
    opcheck(torch.ops.liveweight.unstructured_linear.default, args)
    run = torch.compile(
        lambda x: unstructured_linear(x * 2, packed, bias), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(run(x), unstructured_linear(x * 2, packed, bias))


def test_mixed_dtypes_are_refused():
    x, _, packed, bias = make(5, 8, 12)
    with pytest.raises(TypeError, match="expected x bfloat16 like values, got float32"):
        unstructured_linear(x.float(), packed, bias)
    with pytest.raises(TypeError, match="expected bias bfloat16, got float32"):
        unstructured_linear(x, packed, bias.float())
