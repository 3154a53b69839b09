"""Gradients of kernelwise_conv2d as GPUs take them, checked on any device."""

from __future__ import annotations

import pytest
import torch
from test_kernelwise_conv2d import CASES, assert_close

from liveweight import reference
from liveweight.formats import Kernelwise
from liveweight.ops import kernelwise_conv2d
from liveweight.ops.kernelwise_conv2d_grad import grad_values, grad_x, turn_around, turns_around


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_reference(name):
    case = CASES[name]
    x, weight, packed, _ = case.make(dtype=torch.float64)
    index = (packed.filter_offsets, packed.channels)
    size = reference.conv2d_size(case.size, case.kernel, case.stride, case.padding, case.dilation)
    grad = torch.randn(case.batch, case.filters, *size, dtype=torch.float64)
    args = (grad, packed.values, *index, x.shape, *case.settings)
    got = grad_x(reference.kernelwise_conv2d, *args)
    assert_close(got, reference.kernelwise_conv2d_grad_x(*args), 1)
    args = (grad, x, *index, case.kernel, *case.settings)
    assert_close(grad_values(*args), reference.kernelwise_conv2d_grad_values(*args), 1)


def test_both_ways_to_the_input_are_taken():
    ways = {turns_around(c.kernel, c.stride, c.padding, c.dilation) for c in CASES.values()}
    assert ways == {False, True}
    assert not turns_around((3, 3), (1, 1), (3, 0), (1, 1))
    assert turns_around((3, 3), (1, 1), (3, 0), (2, 1))


@pytest.mark.parametrize("groups", [1, 2])
def test_turned_kernels_are_a_valid_format(groups):
    weight = torch.randn(8, 6 // groups, 3, 2) * (torch.rand(8, 6 // groups, 1, 1) < 0.5)
    packed = Kernelwise.from_dense(weight)
    parts = (packed.values, packed.filter_offsets, packed.channels)
    shape = (6, 8 // groups, 3, 2)
    turned = Kernelwise(*turn_around(*parts, (8, 6, groups)), shape).validate()
    dense = weight.view(groups, 8 // groups, 6 // groups, 3, 2).transpose(1, 2)
    assert torch.equal(turned.to_dense(), dense.reshape(shape).flip(2, 3))


def test_turned_convolution_stops_nan():
    case = CASES["3x3"]
    x, weight, packed, _ = case.make()
    grad = torch.randn(3, 5, 9, 11)
    grad[:, 1] = float("nan")
    args = (grad, packed.values, packed.filter_offsets, packed.channels, x.shape, *case.settings)
    got = grad_x(reference.kernelwise_conv2d, *args)
    reached = (weight[1] != 0).flatten(1).any(1)
    assert 0 < int(reached.sum()) < 6
    assert torch.equal(got.isnan().flatten(2).any(2).any(0), reached)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["3x3", "stride 2", "groups", "1x1", "dilation"])
def test_gradients_on_a_gpu(gpu, name, dtype):
    case = CASES[name]
    x, _, packed, bias = case.make(dtype=dtype)
    wide = [t.double().requires_grad_() for t in (x, packed.values, bias)]
    packed_wide = Kernelwise(wide[1], packed.filter_offsets, packed.channels, packed.shape)
    want = kernelwise_conv2d(wide[0], packed_wide, wide[2], activation="relu", **case.options)
    want.sum().backward()
    moved = [t.detach().to(gpu).requires_grad_() for t in (x, packed.values, bias)]
    index = (packed.filter_offsets.to(gpu), packed.channels.to(gpu))
    there = Kernelwise(moved[1], *index, packed.shape)
    with torch.backends.cudnn.flags(allow_tf32=False):
        y = kernelwise_conv2d(moved[0], there, moved[2], activation="relu", **case.options)
        y.sum().backward()
    close = (
        {"rtol": 0.05, "atol": 0.3} if dtype is not torch.float32 else {"rtol": 1e-4, "atol": 1e-4}
    )
    for got, expected in zip(
        (y, *(t.grad for t in moved)), (want, *(t.grad for t in wide)), strict=True
    ):
        torch.testing.assert_close(got.double().cpu(), expected.double(), **close)
