"""nm_linear: the pattern is checked, the numbers are those of the dense layer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from liveweight.formats import NM, Unstructured
from liveweight.ops import nm_linear, unstructured_linear


def two_of_four(N: int, K: int) -> torch.Tensor:
    weight = torch.randn(N, K)
    groups = F.pad(weight, (0, -K % 4)).view(N, -1, 4)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    keep.scatter_(2, groups.abs().topk(2, dim=2).indices, True)
    return weight * keep.view(N, -1)[:, :K]


@pytest.mark.parametrize("N,K", [(1, 4), (7, 6), (33, 400)])
@pytest.mark.parametrize("M", [0, 1, 5, 40])
def test_forward_and_gradients(M, N, K):
    weight, x, bias = two_of_four(N, K), torch.randn(M, K), torch.randn(N)
    packed = NM.from_dense(weight).validate()
    assert torch.equal(packed.to_dense(), weight)
    inputs = [t.requires_grad_() for t in (x, packed.values, bias)]
    got = nm_linear(x, packed, bias, activation="gelu")
    dense = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = F.gelu(F.linear(*dense))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    want.sum().backward()
    grads = (dense[0].grad, dense[1].grad[packed.coordinates()], dense[2].grad)
    for tensor, expected in zip(inputs, grads, strict=True):
        torch.testing.assert_close(tensor.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_it_is_unstructured_linear():
    weight, x = two_of_four(20, 64), torch.randn(9, 64)
    want = unstructured_linear(x, Unstructured.from_dense(weight))
    assert torch.equal(nm_linear(x, NM.from_dense(weight)), want)


def test_other_patterns():
    weight = torch.zeros(2, 8)
    weight[1, 3] = weight[1, 4] = 1.0
    assert NM.from_dense(weight, n=1, m=4).density == 2 / 16
    with pytest.raises(ValueError, match="at most 1 of 8 entries kept, got 2 in row 1, columns 0"):
        NM.from_dense(weight, n=1, m=8)


def test_messages():
    with pytest.raises(ValueError, match=r"at most 2 of 4 .* got 3 in row 0, columns 4 to 6"):
        NM.from_dense(torch.tensor([[0.0, 1, 0, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="1 <= n <= m, got n=3, m=2"):
        NM.from_dense(torch.ones(1, 2), n=3, m=2)
    with pytest.raises(
        TypeError, match="weight must be formats.NM or formats.SemiStructured, got Unstr"
    ):
        nm_linear(torch.ones(1, 2), Unstructured.from_dense(torch.ones(1, 2)))
