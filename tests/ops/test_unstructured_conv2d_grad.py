"""Gradients of unstructured_conv2d against float64 dense layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from sparse_convs import CASES, LAYOUTS, Case, assert_close, expected, lay_out

from liveweight.ops import unstructured_conv2d


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


@pytest.mark.parametrize("activation,pool", [(None, 1), ("relu", 1), ("relu", 2)])
def test_gradients(case, activation, pool):
    x, weight, packed, bias = case.make()
    if min(F.conv2d(x, weight, **case.options).shape[2:]) < pool:
        pytest.skip("nothing to pool")
    for tensor in (x, packed.values, bias):
        tensor.requires_grad_()
    y = unstructured_conv2d(x, packed, bias, activation=activation, pool=pool, **case.options)
    grad = torch.randn_like(y)
    y.backward(grad)
    dense = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected(*dense, case, activation, pool).backward(grad.double())
    assert_close(x.grad, dense[0].grad, weight[:, 0].numel())
    filters, columns = packed.coordinates()
    want = dense[1].grad.flatten(1)[filters, columns]
    assert_close(packed.values.grad, want, x[:, 0].numel())
    assert_close(bias.grad, dense[2].grad, x[:, 0].numel())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_every_layout(layout):
    case = Case(batch=18)
    x, weight, packed, bias = case.make()
    x = lay_out(x, layout).requires_grad_()
    packed.values.requires_grad_()
    y = unstructured_conv2d(x, packed, bias, activation="relu", padding=1)
    grad = torch.randn(y.shape)
    y.backward(grad)
    dense = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected(*dense, bias, case, "relu").backward(grad.double())
    assert_close(x.grad, dense[0].grad, 45)
    filters, columns = packed.coordinates()
    assert_close(packed.values.grad, dense[1].grad.flatten(1)[filters, columns], 1800)


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
def test_only_the_wanted_gradient(wanted):
    x, _, packed, bias = Case().make()
    tensors = {"x": x, "values": packed.values, "bias": bias}
    tensors[wanted].requires_grad_()
    unstructured_conv2d(x, packed, bias, pool=2).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is not None} == {wanted}


def test_a_gradient_without_memory_of_its_own():
    case = Case(stride=(2, 2))
    x, weight, packed, _ = case.make()
    x.requires_grad_(), packed.values.requires_grad_()
    unstructured_conv2d(x, packed, **case.options).sum().backward()  # its gradient has strides of 0
    dense = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected(*dense, None, case).sum().backward()
    assert_close(x.grad, dense[0].grad, 45)
    filters, columns = packed.coordinates()
    assert_close(packed.values.grad, dense[1].grad.flatten(1)[filters, columns], 300)


def test_gradients_of_an_empty_batch_are_zero():
    x, _, packed, bias = Case(batch=0).make()
    for tensor in (x, packed.values, bias):
        tensor.requires_grad_()
    unstructured_conv2d(x, packed, bias, activation="relu").sum().backward()
    assert x.grad.shape == x.shape and not packed.values.grad.any() and not bias.grad.any()


def test_gradcheck_in_float64():
    case = Case(channels=2, filters=2, size=(5, 4), stride=(1, 2), groups=2, batch=2)
    x, _, packed, bias = case.make(0.9, torch.float64)

    def run(x, values, bias):
        weight = dataclasses.replace(packed, values=values)
        return unstructured_conv2d(x, weight, bias, activation="relu", pool=2, **case.options)

    inputs = [t.requires_grad_() for t in (x, packed.values, bias)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)  # one random direction each
