"""SemiStructuredDelta: an exact split of any pattern, and the layer that uses it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from liveweight.formats import Delta, SemiStructuredDelta
from liveweight.formats.semi_structured_delta import largest_two
from liveweight.ops import semi_structured_delta_linear


def sparse(N: int, K: int, density: float, dtype=torch.float64) -> torch.Tensor:
    return (torch.randn(N, K) * (torch.rand(N, K) < density)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(0, 70), st.floats(0, 1), st.integers(0, 2**31))
def test_the_split_is_exact(N, K, density, seed):
    torch.manual_seed(seed)
    weight = sparse(N, K, density, torch.bfloat16)
    split = SemiStructuredDelta.from_dense(weight).validate()
    assert torch.equal(split.to_dense(), weight)
    first, rest = split.first.to_dense(), split.rest.to_dense()
    assert not (first.bool() & rest.bool()).any()
    # What is left beside a group's two is no larger than either.
    pad = (0, -K % 4)
    if K and N:
        a, b = (F.pad(part.abs(), pad).view(N, -1, 4) for part in (first, rest))
        least = a.masked_fill(a == 0, float("inf")).amin(-1)
        assert (b.amax(-1) <= least).all()
        assert ((b > 0).any(-1) <= ((a > 0).sum(-1) == 2)).all()


def test_ties_go_to_the_lower_column_and_a_mask_keeps_zeros():
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 3.0, float("nan"), 2.0, 5.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    want = [True, True, False, False, False, False, True, True, True]
    assert largest_two(weight, mask)[0].tolist() == want
    split = SemiStructuredDelta.from_dense(weight, mask).validate()
    assert split.rest.entries()[2].tolist() == [2, 3, 4]


def test_how_much_is_left_of_a_random_pattern():
    for density in (0.5, 0.3):
        split = SemiStructuredDelta.from_dense(sparse(400, 400, density, torch.bfloat16))
        left = density**3 * (1 - density) + density**4 / 2
        assert abs(split.rest.density - left) < 0.005
        assert abs(split.density - density) < 0.01
    assert split.nbytes == split.first.nbytes + split.rest.nbytes


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh"])
def test_the_layer_and_its_gradients(activation):
    weight = sparse(20, 50, 0.6)
    split = SemiStructuredDelta.from_dense(weight)
    x, bias = torch.randn(2, 3, 50).double(), torch.randn(20).double()
    inputs = [x, split.first.values, split.rest.values, bias]
    for tensor in inputs:
        tensor.requires_grad_()
    got = semi_structured_delta_linear(x, split, bias, activation=activation)
    dense = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    want = F.linear(*dense)
    if activation == "relu":
        want = F.relu(want)
    elif activation is not None:
        want = F.gelu(want, approximate="tanh" if activation == "gelu_tanh" else "none")
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(x.grad, dense[0].grad)
    torch.testing.assert_close(bias.grad, dense[2].grad)
    got_grad = dataclasses.replace(split.first, values=split.first.values.grad).to_dense()
    index, row, column = split.rest.entries()
    got_grad[row, column] = split.rest.values.grad[index]
    kept = weight != 0
    torch.testing.assert_close(got_grad[kept], dense[1].grad[kept])


def test_messages():
    split = SemiStructuredDelta.from_dense(sparse(8, 8, 0.9, torch.bfloat16))
    with pytest.raises(TypeError, match="weight must be formats.SemiStructuredDelta, got Delta"):
        semi_structured_delta_linear(torch.ones(1, 8).bfloat16(), split.rest)
    with pytest.raises(ValueError, match=r"expected x \[..., 8\], got \(1, 7\)"):
        semi_structured_delta_linear(torch.ones(1, 7).bfloat16(), split)
    other = Delta.from_dense(torch.eye(8, 9).bfloat16())
    with pytest.raises(ValueError, match=r"first has shape \(8, 8\), rest \(8, 9\)"):
        SemiStructuredDelta(split.first, other).validate()
    other = Delta.from_dense(torch.eye(8).half())
    with pytest.raises(ValueError, match="first has dtype torch.bfloat16, rest torch.float16"):
        SemiStructuredDelta(split.first, other).validate()
    with pytest.raises(TypeError, match="SemiStructuredDelta: mask must be a bool tensor"):
        SemiStructuredDelta.from_dense(torch.eye(4), torch.eye(4))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 8, 30, 300])
def test_gpu_layer(gpu, M):
    weight = sparse(300, 520, 0.5, torch.bfloat16)
    split = SemiStructuredDelta.from_dense(weight.to(gpu))
    x, bias = torch.randn(M, 520).bfloat16(), torch.randn(300).bfloat16()
    got = semi_structured_delta_linear(x.to(gpu), split, bias.to(gpu), activation="relu")
    want = F.relu(F.linear(x.double(), weight.double(), bias.double()))
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-2, atol=0.2)
