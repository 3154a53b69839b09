"""Random shapes, patterns, layouts and options for every sparse op, against float64 dense layers.

The cases are the same in every run. A longer search, with new cases each time:
LIVEWEIGHT_FUZZ=2000 python -m pytest tests/ops/test_fuzz.py (examples for each test).
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from liveweight import formats, ops
from liveweight.ops.activation import activation_code, apply_activation

EXAMPLES = int(os.environ.get("LIVEWEIGHT_FUZZ", "0"))


def fuzz(examples: int):
    """Settings of a test: `examples` fixed cases, or as many new ones as LIVEWEIGHT_FUZZ says."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


seeds = st.integers(0, 2**31 - 1)
densities = st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 1.0])
linear_activations = st.sampled_from([None, "relu", "gelu", "gelu_tanh"])
layouts = st.sampled_from([None, "contiguous", "channels_last", "batch_last"])
sizes = st.one_of(st.integers(0, 20), st.integers(1, 300))
batches = st.one_of(st.integers(0, 9), st.sampled_from([16, 17, 33, 64, 65, 130]))


def assert_close(got: torch.Tensor, wanted: torch.Tensor, terms: int, dtype=torch.float32) -> None:
    # Unit normals: rounding of float32 sums, and of the result where its type is narrower.
    narrow = dtype in (torch.bfloat16, torch.float16)
    eps = torch.finfo(dtype).eps if narrow else 0.0
    atol = 4e-6 * (1 + terms) ** 0.5 + eps
    torch.testing.assert_close(got.double(), wanted.double(), rtol=2e-5 + 2 * eps, atol=atol)


def check_backward(got, wanted, leaves, dense, places, terms: int) -> None:
    """Compare the gradients of both results; dense[1] is the weight whose `places` are kept."""
    grad = torch.randn(wanted.shape, dtype=torch.float64)
    grad = grad.float().double()
    got.backward(grad.float())
    wanted.backward(grad)
    for i, (leaf, exact) in enumerate(zip(leaves, dense, strict=True)):
        if leaf is not None:
            assert_close(leaf.grad, exact.grad[places] if i == 1 else exact.grad, terms)


def linear_input(draw, M: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    """Return x [M, K] contiguous, batch-last, or a slice of something wider."""
    how = draw(st.sampled_from(["contiguous", "batch_last", "slice"]))
    if how == "batch_last":
        return torch.randn(K, M).to(dtype).t()
    x = torch.randn(M, 2 * K + 1).to(dtype)
    return x[:, 1 : K + 1] if how == "slice" else x[:, :K].contiguous()


@fuzz(120)
@given(st.data())
def test_unstructured_linear(data):
    draw = data.draw
    M, N, K = draw(batches), draw(sizes), draw(sizes)
    torch.manual_seed(draw(seeds))
    dtype = draw(st.sampled_from([torch.float32] * 3 + [torch.bfloat16, torch.float64]))
    weight = (torch.randn(N, K) * (torch.rand(N, K) < draw(densities))).to(dtype)
    tile = draw(st.sampled_from([None, (16, 32), (5, 256), (256, 300), (64, 7)]))
    packed = formats.Unstructured.from_dense(weight, tile=tile).validate()
    x = linear_input(draw, M, K, dtype)
    bias = torch.randn(N).to(dtype) if draw(st.booleans()) else None
    activation = draw(linear_activations)
    trained = dtype is torch.float32
    leaves = [x.requires_grad_(trained), packed.values.requires_grad_(trained), bias]
    if bias is not None:
        bias.requires_grad_(trained)
    dense = [t if t is None else t.detach().double() for t in (x, weight, bias)]
    dense = [t if t is None else t.requires_grad_(trained) for t in dense]
    last = draw(st.booleans())
    got = ops.unstructured_linear(x, packed, bias, activation=activation, batch_last=last)
    wanted = apply_activation(F.linear(*dense), activation_code(activation))
    assert_close(got, wanted, K, dtype)
    if trained:
        check_backward(got, wanted, leaves, dense, packed.coordinates(), max(M, N, K))


@fuzz(40)
@given(st.data())
def test_nm_linear(data):
    draw = data.draw
    M, N, K, m = draw(batches), draw(sizes), draw(sizes), draw(st.integers(1, 16))
    n = draw(st.integers(1, m))
    torch.manual_seed(draw(seeds))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    groups = -(-K // m)
    ranks = torch.rand(N, groups, m).argsort(-1).argsort(-1).view(N, groups * m)
    weight = (torch.randn(N, K) * (ranks[:, :K] < n)).to(dtype)
    packed = formats.NM.from_dense(weight, n=n, m=m).validate()
    assert torch.equal(packed.to_dense(), weight)
    x, activation = linear_input(draw, M, K, dtype), draw(linear_activations)
    got = ops.nm_linear(x, packed, activation=activation)
    wanted = apply_activation(F.linear(x.double(), weight.double()), activation_code(activation))
    assert_close(got, wanted, K, dtype)


@fuzz(60)
@given(st.data())
def test_block_linear(data):
    draw = data.draw
    block = draw(st.sampled_from([(16, 1), (8, 8), (16, 16), (32, 32)]))
    M, rows, columns = draw(batches), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    torch.manual_seed(draw(seeds))
    kept = torch.rand(rows, columns) < draw(densities)
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight = torch.randn(mask.shape) * mask
    packed = formats.Block.from_dense(weight, block=block)
    x = linear_input(draw, M, mask.shape[1], torch.float32).requires_grad_()
    bias = torch.randn(mask.shape[0]) if draw(st.booleans()) else None
    activation = draw(linear_activations)
    got = ops.block_linear(x, packed, bias, activation=activation)
    exact = x.detach().double().requires_grad_()
    wanted = F.linear(exact, weight.double(), None if bias is None else bias.double())
    wanted = apply_activation(wanted, activation_code(activation))
    assert_close(got, wanted, mask.shape[1])
    check_backward(got, wanted, [x], [exact], None, max(mask.shape))


def conv_case(draw):
    """Return (x, weight shape, keyword arguments of a convolution) of sizes that fit together."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    inputs, filters = groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 20))
    k = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    k = draw(st.sampled_from([(3, 3), (3, 3), (1, 1), k]))
    stride, padding, dilation = (
        (draw(st.integers(low, high)), draw(st.integers(low, high)))
        for low, high in ((1, 3), (0, 3), (1, 2))
    )
    size = draw(st.integers(1, 18)), draw(st.integers(1, 18))
    out = [
        (size[d] + 2 * padding[d] - dilation[d] * (k[d] - 1) - 1) // stride[d] + 1 for d in (0, 1)
    ]
    pool = draw(st.sampled_from([1, 1, 2, 3]))
    assume(min(out) >= pool)
    B = draw(st.sampled_from([0, 1, 2, 3, 8, 17]))
    x = torch.randn(B, inputs, *size)
    how = draw(st.sampled_from(["contiguous", "channels_last", "batch_last", "slice"]))
    if how == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif how == "batch_last":
        x = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    elif how == "slice":
        x = torch.randn(B, inputs, size[0] + 1, size[1] + 2)[:, :, 1:, 2:]
    keys = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return x, (filters, inputs // groups, *k), keys, pool


def check_conv(draw, op, pack, weight_of) -> None:
    torch.manual_seed(draw(seeds))
    x, shape, keys, pool = conv_case(draw)
    weight = weight_of(shape, draw(densities))
    bias = torch.randn(shape[0]) if draw(st.booleans()) else None
    activation, layout = draw(st.sampled_from([None, "relu"])), draw(layouts)
    packed = pack.from_dense(weight).validate()
    x.requires_grad_(), packed.values.requires_grad_()
    got = op(x, packed, bias, **keys, activation=activation, pool=pool, layout=layout)
    exact = x.detach().double().requires_grad_(), weight.double().requires_grad_()
    wanted = F.conv2d(*exact, None if bias is None else bias.double(), **keys)
    wanted = F.relu(wanted) if activation else wanted
    wanted = F.max_pool2d(wanted, pool) if pool > 1 and len(x) else wanted
    if pool > 1 and not len(x):
        wanted = wanted[..., : wanted.shape[2] // pool, : wanted.shape[3] // pool]
    terms = weight[0].numel()
    assert_close(got, wanted, terms)
    if activation or pool > 1:
        return  # a tie decided by rounding may send its gradient another way
    grad = torch.randn(wanted.shape)
    got.backward(grad)
    wanted.backward(grad.double())
    assert_close(x.grad, exact[0].grad, shape[0] * terms)
    dense = torch.zeros(shape)
    index = torch.arange(1.0, weight.numel() + 1).reshape(shape) * (weight != 0)
    places = pack.from_dense(index).values.detach()
    dense.view(-1)[places[places > 0].long() - 1] = packed.values.grad[places > 0]
    assert_close(dense, exact[1].grad * (weight != 0), grad[:, 0].numel())


def whole_kernels(shape, density):
    return torch.randn(shape) * (torch.rand(shape[:2]) < density)[:, :, None, None]


def single_weights(shape, density):
    return torch.randn(shape) * (torch.rand(shape) < density)


@fuzz(120)
@given(st.data())
def test_kernelwise_conv2d(data):
    check_conv(data.draw, ops.kernelwise_conv2d, formats.Kernelwise, whole_kernels)


@fuzz(120)
@given(st.data())
def test_unstructured_conv2d(data):
    check_conv(data.draw, ops.unstructured_conv2d, formats.UnstructuredKernels, single_weights)
