"""bitmap_linear and its kin in CUDA C++: their values, on the emulator and on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from liveweight import reference
from liveweight.formats import Bitmap

FILES = ("bitmap_linear.cuh", "bitmap_dense.cuh", "bitmap_grad.cuh")
TYPES = [torch.bfloat16, torch.float16]


def make(N: int, K: int, density: float, dtype, device) -> tuple[torch.Tensor, Bitmap]:
    generator = torch.Generator().manual_seed(N * 31 + K)
    kept = torch.rand(N, K, generator=generator) < density
    dense = (torch.randn(N, K, generator=generator) * kept).to(dtype).to(device)
    return dense, Bitmap.from_dense(dense)


def parts_of(packed: Bitmap) -> tuple:
    return packed.values, packed.bits, packed.offsets, packed.shape, packed.most


def make_x(M: int, K: int, dtype, device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(M * 7 + K)
    return torch.randn(M, K, generator=generator).to(dtype).to(device)


def expected(x, dense, bias=None, activation: int = 0) -> torch.Tensor:
    """Return act(x W^T + bias) in float64."""
    y = torch.nn.functional.linear(
        x.double(), dense.double(), None if bias is None else bias.double()
    )
    return reference.apply_activation(y, activation)


def assert_close(got, want, message: str = "", roundings: int = 1) -> None:
    rtol = roundings * (2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-10)
    torch.testing.assert_close(
        got.double(), want, rtol=rtol, atol=2e-3, equal_nan=True, msg=lambda m: f"{message}: {m}"
    )


# One tile and less, ragged, rows shared out in fours, K shared out by warps and by blocks; tiles
# without a weight and full ones.
SHAPES = [
    (1, 1, 1.0),
    (33, 130, 0.0),
    (32, 128, 1.0),
    (40, 300, 0.3),
    (130, 136, 0.5),
    (5, 2600, 0.4),
    (70, 4224, 0.5),
]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("M", [1, 8, 9, 17, 33, 64])
def test_values_equal_the_reference_in_every_order(kernels, M, dtype):
    for seed, shape in enumerate(SHAPES):
        dense, packed = make(*shape, dtype, kernels.device)
        x = make_x(M, shape[1], dtype, kernels.device)
        want = expected(x, dense)
        for order in kernels.orders(seed) if M in (1, 33) else ["one"]:
            got = kernels.op("bitmap_linear")(x, *parts_of(packed), None, 0)
            assert_close(got, want, f"{shape}, {order}")


@pytest.mark.parametrize("shape", [(40, 300, 0.3), (20, 4096, 0.5)], ids=["one block", "splits"])
def test_bias_and_activations(kernels, shape):
    dense, packed = make(*shape, torch.bfloat16, kernels.device)
    bias = make_x(1, shape[0], torch.bfloat16, kernels.device)[0]
    for M in (3, 65):  # 65 samples are multiplied densely
        x = make_x(M, shape[1], torch.bfloat16, kernels.device)
        for activation in range(4):
            got = kernels.op("bitmap_linear")(x, *parts_of(packed), bias, activation)
            want = expected(x, dense, bias, activation)
            # A dense product is rounded before its activation.
            assert_close(got, want, f"{M}, {activation}", roundings=2 if M == 65 else 1)


@pytest.mark.sanitized
@pytest.mark.parametrize("M", [1, 12, 40])
def test_small_weights(kernels, M):
    for shape in [(1, 1, 1.0), (40, 300, 0.3), (33, 2500, 0.6)]:
        dense, packed = make(*shape, torch.float16, kernels.device)
        x = make_x(M, shape[1], torch.float16, kernels.device)
        bias = make_x(1, shape[0], torch.float16, kernels.device)[0]
        got = kernels.op("bitmap_linear")(x, *parts_of(packed), bias, 1)
        assert_close(got, expected(x, dense, bias, 1), str(shape))


def test_kept_zeros_and_special_values(kernels):
    weight = torch.zeros(40, 200, dtype=torch.bfloat16, device=kernels.device)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[3] = mask[:, 150] = True
    weight[3, 5], weight[7, 150], weight[8, 150] = float("inf"), float("nan"), -2.0
    packed = Bitmap.from_dense(weight, mask)
    x = make_x(4, 200, torch.bfloat16, kernels.device).abs() + 1
    got = kernels.op("bitmap_linear")(x, *parts_of(packed), None, 0)
    assert_close(got, expected(x, weight))
    assert got[:, 7].isnan().all() and got[:, 3].isinf().all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_of_x_stay_in_their_sample(kernels, poison):
    # 12 samples of 16 that are computed, 200 columns of 256.
    dense, packed = make(40, 200, 0.5, torch.float16, kernels.device)
    x = make_x(12, 200, torch.float16, kernels.device)
    x[11, 199] = x[5, 0] = poison
    got = kernels.op("bitmap_linear")(x, *parts_of(packed), None, 0)
    assert_close(got, expected(x, dense))
    assert got[[0, 1, 2, 3, 4, 6, 7, 8, 9, 10]].isfinite().all()


def test_misaligned_and_empty_input(kernels):
    dense, packed = make(40, 256, 0.5, torch.bfloat16, kernels.device)
    x = make_x(3, 256, torch.bfloat16, kernels.device)
    room = x.new_empty(3 * 256 + 1)
    moved = room[1:].view(3, 256).copy_(x)
    call = kernels.op("bitmap_linear")
    assert torch.equal(call(moved, *parts_of(packed), None, 0), call(x, *parts_of(packed), None, 0))
    assert call(x[:0], *parts_of(packed), None, 0).shape == (0, 40)
    for N, K in [(0, 256), (40, 0)]:
        dense, packed = make(N, K, 0.5, torch.bfloat16, kernels.device)
        bias = make_x(1, N, torch.bfloat16, kernels.device)[0]
        got = call(x[:, :K], *parts_of(packed), bias, 0)
        assert torch.equal(got, bias.expand(3, N))


@pytest.mark.sanitized
@pytest.mark.parametrize("shape", [(1, 1, 1.0), (33, 131, 0.4), (64, 264, 0.5), (70, 130, 0.0)])
def test_dense_and_back(kernels, shape):
    for dtype in TYPES:
        dense, packed = make(*shape, dtype, kernels.device)
        got = kernels.op("bitmap_to_dense")(*parts_of(packed))
        assert torch.equal(got, dense)
        for M in (0, 5, 33, 65):  # 65 samples are multiplied densely
            grad = make_x(M, shape[0], dtype, kernels.device)
            x = make_x(M, shape[1], dtype, kernels.device)
            values = kernels.op("bitmap_linear_grad_values")(grad, x, *parts_of(packed))
            again = dataclasses.replace(packed, values=values).validate()
            want = (grad.double().t() @ x.double()) * packed.mask()
            assert_close(again.to_dense(), want, f"{M}")


def test_plans_of_every_kind_agree(kernels):
    # A full tile among sparse ones asks for slots of 8 KB: fewer stages, fewer warps.
    dense, _ = make(200, 1500, 0.3, torch.bfloat16, kernels.device)
    dense[32:64, 256:384] = 1.0
    packed = Bitmap.from_dense(dense)
    assert packed.most == 512
    for M in (2, 16, 20, 50):
        x = make_x(M, 1500, torch.bfloat16, kernels.device)
        got = kernels.op("bitmap_linear")(x, *parts_of(packed), None, 0)
        assert_close(got, expected(x, dense), str(M))


def test_every_barrier_is_needed(kernels):
    def check():
        # Two slots a warp, and three where little is kept; K shared out by blocks, and by warps.
        for M, N, K, density in [(3, 40, 2600, 0.5), (20, 130, 1000, 0.5), (1, 200, 4400, 0.1)]:
            dense, packed = make(N, K, density, torch.float16, kernels.device)
            x = make_x(M, K, torch.float16, kernels.device)
            got = kernels.op("bitmap_linear")(x, *parts_of(packed), None, 0)
            assert_close(got, expected(x, dense))
        dense, packed = make(33, 131, 0.5, torch.float16, kernels.device)
        assert torch.equal(kernels.op("bitmap_to_dense")(*parts_of(packed)), dense)
        for M in (2, 65):
            grad, x = (make_x(M, n, torch.float16, kernels.device) for n in dense.shape)
            values = kernels.op("bitmap_linear_grad_values")(grad, x, *parts_of(packed))
            again = dataclasses.replace(packed, values=values).to_dense()
            assert_close(again, (grad.double().t() @ x.double()) * packed.mask())

    kernels.assert_every_barrier_is_needed(check, *FILES)


def test_messages(kernels):
    _, packed = make(40, 256, 0.5, torch.bfloat16, kernels.device)
    x = make_x(3, 256, torch.bfloat16, kernels.device)
    values, bits, offsets, shape, most = parts_of(packed)
    bias = x[0, :40].contiguous()
    for message, args in [
        ("x must have shape", (x[:, :200].contiguous(), *parts_of(packed), None, 0)),
        ("x must be BFloat16, got Half", (x.half(), *parts_of(packed), None, 0)),
        ("x must be contiguous", (x.t().contiguous().t(), *parts_of(packed), None, 0)),
        ("bias must have shape", (x, *parts_of(packed), bias[1:], 0)),
        ("values must be BFloat16 or Half", (x, values.float(), *parts_of(packed)[1:], None, 0)),
        ("bits must have shape", (x, values, bits[1:], offsets, shape, most, None, 0)),
        ("bits must be Int", (x, values, bits.long(), offsets, shape, most, None, 0)),
        ("offsets must have shape", (x, values, bits, offsets[1:], shape, most, None, 0)),
        ("most must be in", (x, values, bits, offsets, shape, 513, None, 0)),
        ("activation must be", (x, *parts_of(packed), None, 4)),
    ]:
        with pytest.raises(RuntimeError, match=f"bitmap_linear: {message}"):
            kernels.op("bitmap_linear")(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [(4096, 4096), (14336, 4096), (1000, 11008)])
def test_large_weights_on_the_gpu(gpu, dtype, size):
    for density in (0.5, 0.3, 0.1):
        dense, packed = make(*size, density, dtype, gpu)
        for M in (1, 8, 16, 32, 64, 65):
            x = make_x(M, size[1], dtype, gpu) / 8
            got = torch.ops.liveweight.bitmap_linear(x, *parts_of(packed), None, 0)
            assert_close(got, expected(x, dense), f"{M}, {density}")
            again = torch.ops.liveweight.bitmap_linear(x, *parts_of(packed), None, 0)
            assert torch.equal(got, again)


@pytest.mark.gpu
def test_runs_in_a_cuda_graph(gpu):
    for size in [(4096, 4096), (256, 8192)]:  # one launch; two
        dense, packed = make(*size, 0.4, torch.bfloat16, gpu)
        x = make_x(4, size[1], torch.bfloat16, gpu)
        y = torch.ops.liveweight.bitmap_linear(x, *parts_of(packed), None, 0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = torch.ops.liveweight.bitmap_linear(x, *parts_of(packed), None, 0)
        graph.replay()
        assert torch.equal(y, replayed)
