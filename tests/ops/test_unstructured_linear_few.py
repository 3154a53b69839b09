"""unstructured_linear for one to four samples: bits beside columns, spread or gathered."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from liveweight.formats import Unstructured
from liveweight.ops import unstructured_linear


def make(N, K, density, dtype=torch.float32):
    kept = torch.rand(N, K) < density
    return torch.randn(N, K, dtype=dtype) * kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("N,K", [(1, 1), (17, 63), (33, 256), (70, 700)])
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5])
def test_bits_and_columns_agree(M, N, K, density, dtype):
    x, weight, bias = torch.randn(M, K, dtype=dtype), make(N, K, density, dtype), torch.randn(N)
    packed = Unstructured.from_dense(weight)
    bare = dataclasses.replace(packed, bits=torch.zeros(0, 0, dtype=torch.uint8))
    want = x.double() @ weight.double().T + bias.to(dtype).double()
    close = 1e-2 if dtype is torch.bfloat16 else 1e-5
    for given in (packed, bare):
        got = unstructured_linear(x, given, bias.to(dtype))
        torch.testing.assert_close(got.double(), want, rtol=close, atol=close * K**0.5)


def test_bits_are_kept_where_many_weights_are():
    for density, stored in ((0.05, False), (0.5, True)):
        packed = Unstructured.from_dense(make(64, 512, density))
        assert (packed.bits.numel() > 0) == stored
        assert packed.nbytes <= 1.05 * 6 * packed.values.numel()
    for tile, size in (((16, 32), 4), ((16, 40), 0), ((16, 512), 0), ((16, 256), 32)):
        packed = Unstructured.from_dense(make(64, 512, 0.5), tile=tile).validate()
        assert packed.bits.numel() == size * packed.segments.shape[0]


def test_bits_tell_the_columns():
    weight = torch.tensor([[0.0, 2.0, 0.0] * 4, [3.0, 0.0, 4.0] * 4])
    packed = Unstructured.from_dense(weight, tile=(16, 16))
    assert packed.segments.tolist() == [[1, 7], [0, 3]]
    assert packed.bits.tolist() == [[0b01101101, 0b1011], [0b10010010, 0b0100]]


@pytest.mark.parametrize("M", [1, 2, 3, 4])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_removed_weights_stop_nan_and_inf(M, poison):
    weight = make(30, 300, 0.5)
    packed, x = Unstructured.from_dense(weight), torch.randn(M, 300)
    assert packed.bits.numel()
    x[:, 7] = poison
    got = unstructured_linear(x, packed)
    clear = weight[:, 7] == 0
    assert 0 < int(clear.sum()) < 30
    assert bool(got[:, clear].isfinite().all()) and not bool(got[:, ~clear].isfinite().any())


@pytest.mark.parametrize("M", [1, 3])
def test_threads_and_layouts_change_nothing(M):
    packed, x = Unstructured.from_dense(make(300, 1000, 0.5)), torch.randn(M, 1000)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [unstructured_linear(x, packed), unstructured_linear(x, packed, batch_last=True)]
        results.append(unstructured_linear(x.t().contiguous().t(), packed))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_launcher_guards_memory():
    packed, x = Unstructured.from_dense(make(5, 256, 0.5)), torch.randn(1, 256)

    def refuses(message, bits, tile=packed.tile):
        index = (packed.columns, packed.segments, packed.offsets, bits, tile)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.liveweight.unstructured_linear(
                x, packed.values, *index, 5, None, activation=0, batch_last=False
            )

    refuses(r"expected bits \[5, 32\]", packed.bits[:4])
    refuses("bits do not agree with segments", packed.bits | 64)
    refuses("bits has the wrong dtype", packed.bits.int())
    wide = Unstructured.from_dense(make(5, 256, 0.5), tile=(16, 255))
    index = (wide.columns, wide.segments, wide.offsets, packed.bits, wide.tile)
    with pytest.raises(RuntimeError, match="bits need tiles of 16, 32"):
        torch.ops.liveweight.unstructured_linear(
            x, wide.values, *index, 5, None, activation=0, batch_last=False
        )


def test_validate_names_broken_bits():
    good = Unstructured.from_dense(make(20, 300, 0.5)).validate()
    flipped = good.bits.clone()
    flipped[3, 2] ^= 8
    for bits, error, message in (
        (flipped, ValueError, "bits and columns name different entries"),
        (good.bits[:-1], ValueError, "bits must be"),
        (good.bits.int(), TypeError, "bits must be uint8, got int32"),
        (good.bits.to("meta"), ValueError, "bits on meta, columns on cpu"),
    ):
        with pytest.raises(error, match=f"Unstructured: {message}"):
            dataclasses.replace(good, bits=bits).validate()


def test_modules_carry_bits_along():
    from liveweight.nn import SparseLinear

    linear = torch.nn.Linear(300, 20)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(20, 300) < 0.5)
    sparse = SparseLinear.from_dense(linear)
    again = SparseLinear.from_dense(linear)
    again.load_state_dict(sparse.state_dict())
    assert again.bits.numel() and torch.equal(again.bits, sparse.bits)
    x = torch.randn(2, 300)
    torch.testing.assert_close(again(x), linear(x), rtol=1e-5, atol=1e-5)
