"""Tensors of more than 2**31 elements: addresses that a 32-bit product of sizes would lose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from liveweight import formats, ops

pytestmark = pytest.mark.gpu
NEEDED_BYTES = 24 << 30
# Rows, columns: 2.6e9 elements.
ROWS, WIDTH = 40_000, 65_536


@pytest.fixture
def big_gpu(gpu):
    if torch.cuda.get_device_properties(gpu).total_memory < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES >> 30} GiB of GPU memory")
    yield gpu
    torch.cuda.empty_cache()


def big(gpu, *shape):
    """Return bfloat16 noise made in place: a float32 copy would be twice as large."""
    return torch.empty(*shape, device=gpu, dtype=torch.bfloat16).normal_()


def assert_close(got, want):
    assert (got.double() - want.double()).norm() <= 1e-2 * want.double().norm()


def sparse_weight(gpu, rows, columns):
    weight = torch.randn(rows, columns, device=gpu, dtype=torch.bfloat16)
    blocks = torch.rand(-(-rows // 64), -(-columns // 64), device=gpu) < 0.05
    blocks[:, -1] = True
    full = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)[:rows, :columns]
    return weight * full


def test_many_inputs_of_block_linear(big_gpu):
    x, weight = big(big_gpu, ROWS, WIDTH), sparse_weight(big_gpu, 64, WIDTH)
    packed = formats.Block.from_dense(weight, block=(64, 64))
    packed.values.requires_grad_()
    y = ops.block_linear(x, packed)
    assert_close(y[-100:], F.linear(x[-100:].double(), weight.double()))
    y[-100:].sum().backward()
    want = x[-100:, -64:].double().sum(0)[:, None].expand(64, 64)
    assert_close(packed.values.grad[-1], want)


def test_many_outputs_of_block_linear(big_gpu):
    x, weight = big(big_gpu, ROWS, 64), sparse_weight(big_gpu, WIDTH, 64)
    y = ops.block_linear(x, formats.Block.from_dense(weight, block=(64, 64)))
    assert y.numel() > 2**31
    assert_close(y[-50:], F.linear(x[-50:].double(), weight.double()))


def test_a_large_weight_of_masked_linear(big_gpu):
    weight, x = big(big_gpu, ROWS, WIDTH), torch.randn(16, WIDTH, device=big_gpu).bfloat16()
    rare = torch.zeros(ROWS, WIDTH, dtype=torch.bool, device=big_gpu)
    rare[:, ::64] = True
    bits = torch.empty(ROWS, WIDTH // 32, dtype=torch.int32, device=big_gpu)
    for start in range(0, ROWS, 4000):  # packing takes 8 bytes a weight
        bits[start : start + 4000] = ops.pack_mask_bits(rare[start : start + 4000])
    y = ops.masked_linear(x, weight, bits)
    assert_close(y[:, -100:], x.double()[:, ::64] @ weight[-100:, ::64].double().t())


def test_many_pictures_of_block_conv2d(big_gpu):
    x = big(big_gpu, 640, 256, 128, 128).contiguous(memory_format=torch.channels_last)
    weight = sparse_weight(big_gpu, 64, 256)[:, :, None, None] * big(big_gpu, 64, 256, 3, 3)
    packed = formats.BlockKernels.from_dense(weight, block=(64, 64))
    y = ops.block_conv2d(x, packed, padding=1)
    assert_close(y[-2:], F.conv2d(x[-2:].double(), weight.double(), padding=1))
