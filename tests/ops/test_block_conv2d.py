"""block_conv2d on the CPU: values and gradients against float64, the op's contract, messages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from liveweight import ops, reference
from liveweight.formats import BlockKernels

from .block_convs import CASES, Case, expected, expected_grads, index

# Rounding of the result to the dtype, relative to the largest output: sums are float32 or better.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_close(got, want):
    assert got.shape == want.shape
    scale = want.abs().max().clamp(min=1) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=float(TOLERANCE[got.dtype] * scale))


def is_channels_last(x) -> bool:
    return x.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_values_and_gradients_equal_the_dense_convolution(case, relu):
    x, weight, packed, bias = case.make(torch.float64)
    for tensor in (x, packed.values, bias):
        tensor.requires_grad_()
    y = ops.block_conv2d(x, packed, bias, activation="relu" if relu else None, **case.options)
    assert_close(y, expected(x.detach(), weight, bias.detach(), case, relu))
    assert is_channels_last(y)
    grad = torch.randn(y.shape, dtype=y.dtype)
    grads = torch.autograd.grad(y, (x, packed.values, bias), grad)
    inner = grad * (y > 0) if relu else grad
    want_x, want_weight = expected_grads(inner, x.detach(), weight, case)
    assert_close(grads[0], want_x)
    dense = dataclasses.replace(packed, values=grads[1]).to_dense()
    kept = dataclasses.replace(packed, values=torch.ones_like(grads[1])).to_dense()
    assert_close(dense, want_weight * kept)
    assert int(dense.count_nonzero()) == int(grads[1].count_nonzero())  # padding stays zero
    assert_close(grads[2], inner.sum((0, 2, 3)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dtypes_and_layouts(dtype, layout):
    case = Case(37, 45, stride=(2, 1))
    x, weight, packed, bias = case.make(dtype)
    x = x.contiguous(memory_format=layout)
    y = ops.block_conv2d(x, packed, bias, **case.options)
    assert y.dtype is dtype and is_channels_last(y)
    assert_close(y, expected(x, weight, bias, case))
    assert torch.equal(ops.block_conv2d(x[0], packed, bias, **case.options), y[0])


def test_removed_blocks_are_not_multiplied():
    x, weight, packed, _ = Case(64, 32, density=1.0).make()
    weight[:16, 32:48] = 0
    packed = BlockKernels.from_dense(weight)
    x[:, 32:48] = float("nan")
    y = ops.block_conv2d(x, packed, padding=1)
    assert not y[:, :16].isnan().any() and y[:, 16:].isnan().all()


def test_many_samples_go_in_parts(monkeypatch):
    case = Case(batch=7)
    x, weight, packed, bias = case.make()
    monkeypatch.setattr("liveweight.reference.parts._CHUNK", 3000)
    x.requires_grad_()
    y = ops.block_conv2d(x, packed, bias, **case.options)
    assert_close(y, expected(x.detach(), weight, bias, case))
    grad = torch.randn_like(y)
    assert_close(
        torch.autograd.grad(y, x, grad)[0], expected_grads(grad, x.detach(), weight, case)[0]
    )


@pytest.mark.parametrize("name", ["3x3", "stride 2", "groups", "ragged channels"])
def test_opcheck(name):
    case = CASES[name]
    x, _, packed, bias = case.make()
    grad = torch.randn_like(ops.block_conv2d(x, packed, bias, **case.options))
    parts, settings = index(packed), case.settings
    namespace = torch.ops.liveweight
    for op, args in [
        (namespace.block_conv2d, (x, packed.values, *parts, bias, *settings, True)),
        (namespace.block_conv2d_grad_x, (grad, packed.values, *parts, x.shape, *settings)),
        (namespace.block_conv2d_grad_values, (grad, x, *parts, packed.block, *settings)),
    ]:
        torch.library.opcheck(op.default, args)


def test_compiles_whole_with_gradients():
    case = Case()
    x, weight, packed, bias = case.make()

    def step(x, values, bias):
        given = dataclasses.replace(packed, values=values)
        return ops.block_conv2d(x, given, bias, activation="relu", **case.options)

    operands = [t.clone().requires_grad_() for t in (x, packed.values, bias)]
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(*operands)
    assert_close(y, expected(x, weight, bias, case, relu=True))
    got = torch.autograd.grad(y.square().sum(), operands)
    want = torch.autograd.grad(step(*operands).square().sum(), operands)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_narrows_the_input():
    case = Case()
    x, weight, packed, _ = case.make(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.block_conv2d(x.float(), packed, **case.options)
    assert y.dtype is torch.bfloat16
    assert_close(y, expected(x, weight, None, case))


def test_messages():
    x, weight, packed, bias = Case().make()
    grouped = BlockKernels.from_dense(weight[:, :16], block=(16, 16))
    wide = BlockKernels.from_dense(weight[:, :16], block=(32, 16))
    call = ops.block_conv2d
    for error, message, args, options in [
        (TypeError, "weight must be formats.BlockKernels, got Tensor", (x, weight), {}),
        (TypeError, "x must be a tensor, got list", ([1], packed), {}),
        (ValueError, r"expected x \[B, 32, H, W\]", (x[:, :16], packed), {}),
        (ValueError, r"expected x \[B, 32, H, W\]", (x[0, 0], packed), {}),
        (TypeError, "expected x float32 like values, got float64", (x.double(), packed), {}),
        (ValueError, "x is on meta, expected cpu like values", (x.to("meta"), packed), {}),
        (ValueError, "bias is on meta, expected cpu", (x, packed, bias.to("meta")), {}),
        (ValueError, r"expected bias \[32\]", (x, packed, bias[:5]), {}),
        (TypeError, "expected bias float32", (x, packed, bias.half()), {}),
        (ValueError, "^block_conv2d: stride must be >= 1", (x, packed), {"stride": 0}),
        (ValueError, "padding must be", (x, packed), {"padding": "same"}),
        (ValueError, "activation", (x, packed), {"activation": "gelu"}),
        (ValueError, "do not form groups=3", (x, packed), {"groups": 3}),
        (ValueError, "blocks of 32 filters cross groups.*divide 16", (x, wide), {"groups": 2}),
        (ValueError, r"too small for kernel \(3, 3\).*\(-3, 1\)", (x[..., :1, :3], packed),
         {"dilation": (2, 1), "stride": (1, 2)}),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call(*args, **options)
    assert call(x, grouped, groups=2).shape == (2, 32, 3, 4)


def test_the_reference_is_what_serves_a_cpu():
    case = Case()
    x, _, packed, bias = case.make()
    got = ops.block_conv2d(x, packed, bias, **case.options)
    want = reference.block_conv2d(x, packed.values, *index(packed), bias, *case.settings, False)
    assert torch.equal(got, want)
    assert_close(got, functional.conv2d(x, packed.to_dense(), bias, padding=1).double())
