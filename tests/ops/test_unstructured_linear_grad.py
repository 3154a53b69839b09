"""The gradients of unstructured_linear, op by op, against float64 products of dense matrices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.library import opcheck

from liveweight import _library
from liveweight.formats import Unstructured
from liveweight.ops import unstructured_linear

GRAD_X = torch.ops.liveweight.unstructured_linear_grad_x.default
GRAD_VALUES = torch.ops.liveweight.unstructured_linear_grad_values.default
needs_kernels = pytest.mark.skipif(
    _library.status()["cpu"] != "loaded", reason=f"CPU kernels: {_library.status()['cpu']}"
)


def make(M: int, N: int, K: int, density: float = 0.3, tile=None):
    """Return (grad, x, dense weight with zeros, its format)."""
    weight = torch.randn(N, K) * (torch.rand(N, K) < density)
    return torch.randn(M, N), torch.randn(M, K), weight, Unstructured.from_dense(weight, tile=tile)


def both(grad, x, packed):
    index = (packed.columns, packed.segments, packed.offsets, packed.tile)
    return GRAD_X(grad, packed.values, *index, x.shape[1]), GRAD_VALUES(grad, x, *index)


def check(grad, x, weight, packed):
    grad_x, grad_values = both(grad, x, packed)
    # Rounding of float32 sums of products of unit normals.
    for got, want, terms in (
        (grad_x, grad.double() @ weight.double(), weight.shape[0]),
        (grad_values, (grad.double().t() @ x.double())[packed.coordinates()], len(x)),
    ):
        atol = 3e-6 * max(terms, 1) ** 0.5
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("N,K", [(1, 1), (7, 5), (40, 70), (300, 257), (64, 600), (0, 4), (4, 0)])
@pytest.mark.parametrize("M", [0, 1, 15, 16, 17, 33, 64, 65, 100])
def test_values(M, N, K):
    check(*make(M, N, K))


@pytest.mark.parametrize("tile", [(1, 1), (16, 32), (7, 300), (256, 256), (256, 32768)])
@pytest.mark.parametrize("M", [3, 70])
def test_any_tile(M, tile):
    check(*make(M, 280, 700, 0.1, tile))


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_any_density(density):
    check(*make(40, 90, 130, density))


def test_a_batch_that_runs_in_parts():
    check(*make(600, 33, 70))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_removed_weights_stop_nan_and_inf(poison):
    grad, x, weight, packed = make(20, 30, 40, 0.2)
    grad[:, 4] = poison
    grad_x, _ = both(grad, x, packed)
    assert bool(grad_x[:, weight[4] == 0].isfinite().all())
    assert not bool(grad_x[:, weight[4] != 0].isfinite().any())


@needs_kernels
def test_threads_change_no_bit():
    threads = torch.get_num_threads()
    for M, N, K in [(70, 300, 700), (300, 100, 400), (130, 600, 40)]:
        grad, x, _, packed = make(M, N, K, 0.2)
        results = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(both(grad, x, packed))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_two_threads_at_once():
    cases = [make(M, 200, 300) for M in (40, 90)]
    wanted = [both(g, x, w) for g, x, _, w in cases]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(both, g, x, w) for _ in range(10) for g, x, _, w in cases]
        for i, job in enumerate(jobs):
            got = job.result()
            assert all(torch.equal(a, b) for a, b in zip(got, wanted[i % 2], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(20, 30) * (torch.rand(20, 30) < 0.3)).to(dtype)
    packed = Unstructured.from_dense(weight)
    x, grad = torch.randn(9, 30).to(dtype), torch.randn(9, 20).to(dtype)
    x.requires_grad_(), packed.values.requires_grad_()
    unstructured_linear(x, packed).backward(grad)
    assert x.grad.dtype == packed.values.grad.dtype == dtype
    loose = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    want = grad.double() @ weight.double()
    torch.testing.assert_close(x.grad.double(), want, **loose)
    want = (grad.double().t() @ x.detach().double())[packed.coordinates()]
    torch.testing.assert_close(packed.values.grad.double(), want, **loose)


@pytest.mark.parametrize("tile", [None, (8, 300)])
def test_opcheck(tile):
    grad, x, _, packed = make(5, 12, 20, 0.3, tile)
    index = (packed.columns, packed.segments, packed.offsets, packed.tile)
    opcheck(GRAD_X, (grad, packed.values, *index, 20))
    opcheck(GRAD_VALUES, (grad, x, *index))


@needs_kernels
def test_broken_patterns_are_errors():
    grad, x, _, packed = make(5, 12, 400, 0.3, (8, 300))
    parts = [packed.columns, packed.segments, packed.offsets, packed.tile]

    def broken(i, change):
        changed = list(parts)
        changed[i] = change(parts[i].clone())
        return changed

    for index, message in (
        (broken(0, lambda c: c.index_fill_(0, torch.tensor([3]), 300)), "columns must be in"),
        (broken(0, lambda c: c.index_fill_(0, torch.tensor([3]), -1)), "columns must be in"),
        (broken(1, lambda s: s + 8), "segments do not agree"),
        (broken(1, lambda s: s[:-1]), "offsets must rise"),
        (broken(2, lambda o: o[:-1]), "expected offsets"),
    ):
        with pytest.raises(RuntimeError, match=message):
            GRAD_X(grad, packed.values, *index, 400)
        with pytest.raises(RuntimeError, match=message):
            GRAD_VALUES(grad, x, *index)
