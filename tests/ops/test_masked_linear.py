"""masked_linear: values, gradients, registration, messages; and the packing of masks into bits."""

from __future__ import annotations

import pytest
import torch

from liveweight import ops

SIZES = [(1, 1, 1), (17, 5, 31), (3, 129, 32), (63, 17, 33), (2, 8, 200)]
# Of the largest output. float32: rounding of sums of up to 200 terms; the others: one rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}


def case(M, N, K, dtype=torch.float32, keep=0.4):
    x, weight = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    return x, weight, torch.rand(N, K) < keep, torch.randn(N).to(dtype)


def dense(x, weight, mask, bias):
    y = x.double() @ (weight.double() * mask).t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_equal_the_masked_dense_layer_in_float64(dtype, size):
    x, weight, mask, bias = case(*size, dtype)
    for b in (bias, None):
        y = ops.masked_linear(x, weight, ops.pack_mask_bits(mask), b)
        want = dense(x, weight, mask, b)
        assert y.dtype == dtype
        assert (y.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_nothing_kept_and_all_kept(keep):
    x, weight, mask, bias = case(4, 6, 40, keep=keep)
    y = ops.masked_linear(x, weight, ops.pack_mask_bits(mask), bias)
    torch.testing.assert_close(y, dense(x, weight, mask, bias).float())


def test_leading_dimensions_strides_and_empty_batches():
    x, weight, mask, bias = case(24, 10, 37)
    bits = ops.pack_mask_bits(mask)
    want = ops.masked_linear(x, weight, bits, bias)
    batched = ops.masked_linear(x.view(2, 3, 4, 37), weight, bits, bias)
    assert batched.shape == (2, 3, 4, 10) and torch.equal(batched.view(24, 10), want)
    torch.testing.assert_close(ops.masked_linear(x[0], weight, bits, bias), want[0])
    strided = torch.randn(37, 24).t().copy_(x), torch.randn(37, 10).t().copy_(weight)
    assert torch.equal(ops.masked_linear(*strided, bits.t().contiguous().t(), bias), want)
    assert ops.masked_linear(x[:0], weight, bits, bias).shape == (0, 10)
    assert torch.equal(ops.masked_linear(x[:, :0], weight[:, :0], bits[:, :0], bias)[3], bias)


def test_masked_weights_are_never_used_whatever_they_hold():
    x, weight, mask, bias = case(5, 7, 50)
    bits = ops.pack_mask_bits(mask)
    poisoned = weight.masked_fill(~mask, float("nan")).requires_grad_()
    x.requires_grad_()
    y = ops.masked_linear(x, poisoned, bits, bias)
    assert torch.equal(y, ops.masked_linear(x, weight, bits, bias))
    y.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(poisoned.grad).all()
    assert (poisoned.grad[~mask] == 0).all()


def test_gradients_equal_finite_differences_to_second_order():
    x, weight, mask, bias = case(3, 4, 35, torch.float64)
    bits = ops.pack_mask_bits(mask)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def layer(x, weight, bias):
        return ops.masked_linear(x, weight, bits, bias)

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)

    def slope(x, weight):  # whose second derivatives are the third ones of the layer
        return torch.autograd.grad(layer(x, weight, bias).pow(3).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, inputs[:2])


@pytest.mark.parametrize("needs", ["x", "weight", "bias"])
def test_each_gradient_alone_equals_the_dense_one(needs):
    tensors = dict(zip(("x", "weight", "mask", "bias"), case(6, 9, 70), strict=True))
    grad = torch.randn(6, 9)
    tensors[needs].requires_grad_()
    x, weight, mask, bias = tensors.values()
    ops.masked_linear(x, weight, ops.pack_mask_bits(mask), bias).backward(grad)
    got, tensors[needs].grad = tensors[needs].grad, None
    dense(x, weight, mask, bias).backward(grad.double())
    torch.testing.assert_close(got, tensors[needs].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dtype, bias):
    x, weight, mask, b = case(5, 6, 40, dtype)
    bits = ops.pack_mask_bits(mask)
    torch.library.opcheck(
        torch.ops.liveweight.masked_linear.default, (x, weight, bits, b if bias else None)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_gradients_and_of_packing(dtype):
    x, weight, mask, _ = case(5, 6, 40, dtype)
    torch.library.opcheck(torch.ops.liveweight.pack_mask_bits.default, (mask,))
    bits, grad = ops.pack_mask_bits(mask), torch.randn(5, 6).to(dtype)
    torch.library.opcheck(torch.ops.liveweight.masked_linear_grad_x.default, (grad, weight, bits))
    torch.library.opcheck(torch.ops.liveweight.masked_linear_grad_weight.default, (grad, x, bits))


def test_compiles_without_a_graph_break_and_trains():
    x, weight, mask, bias = case(5, 6, 40)
    bits = ops.pack_mask_bits(mask)
    weight.requires_grad_()

    def loss(x, weight, bias):
        return ops.masked_linear(x.relu(), weight, bits, bias).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), loss(x, weight, bias))
    (got,) = torch.autograd.grad(compiled(x, weight, bias), weight)
    (want,) = torch.autograd.grad(loss(x, weight, bias), weight)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("K", [0, 1, 31, 32, 33, 64, 100])
def test_masks_survive_packing(K):
    mask = torch.rand(7, K) < 0.5
    bits = ops.pack_mask_bits(mask)
    assert bits.dtype == torch.int32 and bits.shape == (7, -(-K // 32))
    assert torch.equal(ops.unpack_mask_bits(bits, K), mask)
    assert torch.equal(ops.pack_mask_bits(mask.t().contiguous().t()), bits)


def test_bit_order_is_the_documented_one():
    mask = torch.zeros(1, 70, dtype=torch.bool)
    mask[0, [0, 31, 33, 69]] = True
    assert ops.pack_mask_bits(mask).tolist() == [[1 - 2**31, 2, 1 << 5]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.randn(2, 39)}, ValueError, r"expected x \[..., 40\].* got \(2, 39\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"expected x \[..., 40\].* got \(\)"),
        ({"x": torch.ones(2, 40, dtype=torch.int32)}, TypeError, "x must be float32.* got int32"),
        ({"weight": torch.randn(40)}, ValueError, "weight must have 2 dimensions"),
        ({"weight": torch.randn(6, 40).half()}, TypeError, "weight must be float32, got float16"),
        ({"mask_bits": torch.zeros(6, 40)}, TypeError, "mask_bits must be int32, got float32"),
        (
            {"mask_bits": torch.zeros(6, 40).int()},
            ValueError,
            r"\[6, 2\].* got \(6, 40\)",
        ),
        ({"mask_bits": torch.zeros(6, 2, device="meta").int()}, ValueError, "mask_bits is on meta"),
        ({"bias": torch.randn(5)}, ValueError, r"expected bias \[6\], got \(5,\)"),
        ({"bias": torch.randn(6).double()}, TypeError, "bias must be float32, got float64"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    good = {
        "x": torch.randn(2, 40),
        "weight": torch.randn(6, 40),
        "mask_bits": torch.zeros(6, 2, dtype=torch.int32),
        "bias": torch.randn(6),
    }
    with pytest.raises(error, match=message):
        ops.masked_linear(**{**good, **change})


def test_wrong_masks_are_named():
    with pytest.raises(TypeError, match="mask must be bool, got float32"):
        ops.pack_mask_bits(torch.ones(2, 3))
    with pytest.raises(ValueError, match="mask must have 2 dimensions"):
        ops.pack_mask_bits(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected bits \[N, 2\] for K = 33, got \(1, 1\)"):
        ops.unpack_mask_bits(torch.zeros(1, 1, dtype=torch.int32), 33)
    with pytest.raises(TypeError, match="bits must be int32, got int64"):
        ops.unpack_mask_bits(torch.zeros(1, 1, dtype=torch.int64), 32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_values_and_gradients_on_the_gpu(gpu, dtype):
    x, weight, mask, bias = (t.to(gpu) for t in case(65, 130, 200, dtype))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    grad = torch.randn(65, 130, device=gpu).to(dtype)
    y = ops.masked_linear(x, weight, ops.pack_mask_bits(mask), bias)
    got = [y, *torch.autograd.grad(y, leaves, grad)]
    want = dense(x, weight, mask, bias)
    wanted = [want, *torch.autograd.grad(want, leaves, grad.double())]
    for g, w in zip(got, wanted, strict=True):
        # cuBLAS sums the gradients in float32 and rounds once, too; TF32 is off by default.
        assert (g.double() - w.double()).abs().max() <= 4 * TOLERANCE[dtype] * w.abs().max()
