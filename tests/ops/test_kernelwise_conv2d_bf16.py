"""kernelwise_conv2d in bf16: added up in fp32, rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from liveweight.formats import Kernelwise
from liveweight.ops import kernelwise_conv2d

BF16 = torch.bfloat16
ORDERS = {"contiguous": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "batch_last": (1, 2, 3, 0)}


def make(batch=3, channels=6, filters=5, kernel=3, size=(9, 11)):
    shape = (filters, channels, kernel, kernel)
    weight = (torch.randn(shape) * (torch.rand(*shape[:2], 1, 1) < 0.5)).to(BF16)
    x = torch.randn(batch, channels, *size, dtype=BF16)
    return x, weight, Kernelwise.from_dense(weight), torch.randn(filters, dtype=BF16)


def expected(x, weight, bias=None, pool=1, **options):
    bias = None if bias is None else bias.double()
    y = F.conv2d(x.double(), weight.double(), bias, **options).relu()
    return F.max_pool2d(y, pool) if pool > 1 else y


def assert_rounded_once(got, want):
    """Within half a unit of bf16 of the exact number, and what summing in fp32 may add."""
    assert got.dtype is BF16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2e-5)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("kernel,padding,stride", [(3, 1, 1), (1, 0, 1), (3, 1, 2), (5, 2, 1)])
@pytest.mark.parametrize("batch,size", [(0, (9, 9)), (1, (4, 4)), (3, (8, 8)), (17, (5, 19))])
def test_forward(batch, size, kernel, padding, stride, pool):
    x, weight, packed, bias = make(batch, kernel=kernel, size=size)
    options = {"stride": stride, "padding": padding}
    for b in (None, bias):
        got = kernelwise_conv2d(x, packed, b, activation="relu", pool=pool, **options)
        if batch == 0:
            assert got.shape[:2] == (0, 5) and got.dtype is BF16
        else:
            assert_rounded_once(got, expected(x, weight, b, pool, **options))


@pytest.mark.parametrize("layout", ORDERS)
def test_layouts(layout):
    x, weight, packed, bias = make()
    order = ORDERS[layout]
    x = x.permute(order).contiguous().permute(tuple(order.index(d) for d in range(4)))
    got = kernelwise_conv2d(x, packed, bias, padding=1, activation="relu")
    assert got.permute(order).is_contiguous()
    assert_rounded_once(got, expected(x, weight, bias, padding=1))


def test_nan_stays_nan():
    x, weight, packed, _ = make(batch=1)
    x[0, 2, 4, 5] = float("nan")
    got = kernelwise_conv2d(x, packed, padding=1)
    reached = (weight[:, 2] != 0).flatten(1).any(1)
    assert torch.equal(got[0, :, 4, 5].isnan(), reached)


@pytest.mark.parametrize("pool", [1, 2])
def test_gradients(pool):
    x, weight, packed, bias = make(size=(8, 10))
    tensors = [x, packed.values, bias]
    for tensor in tensors:
        tensor.requires_grad_()
    got = kernelwise_conv2d(x, packed, bias, padding=1, pool=pool)
    grad = torch.randn_like(got)
    got.backward(grad)
    dense = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*dense, padding=1)
    if pool > 1:
        y = F.max_pool2d(y.to(BF16).float(), pool)  # equal neighbours after rounding: the first
    y.backward(grad.float())
    kept = (weight != 0).flatten(2).any(2)
    for tensor, want in zip(tensors, (d.grad for d in dense), strict=True):
        want = want[kept] if tensor is packed.values else want
        assert tensor.grad.dtype is BF16
        torch.testing.assert_close(tensor.grad.float(), want, rtol=2**-6, atol=5e-2)


def test_opcheck_and_threads():
    x, _, packed, bias = make(batch=5, channels=24, filters=30, size=(20, 20))
    index = (packed.filter_offsets, packed.channels)
    args = (x, packed.values, *index, bias, (1, 1), (1, 1), (1, 1), 1, True, 2, 0)
    opcheck(torch.ops.liveweight.kernelwise_conv2d.default, args)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(kernelwise_conv2d(x, packed, bias, padding=1))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_mixed_dtypes_are_refused():
    x, _, packed, bias = make()
    with pytest.raises(TypeError, match="expected x bfloat16 like values, got float32"):
        kernelwise_conv2d(x.float(), packed)
    with pytest.raises(TypeError, match="expected bias bfloat16, got float32"):
        kernelwise_conv2d(x, packed, bias.float())
