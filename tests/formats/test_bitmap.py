"""Bitmap: round trips for any weight, its layout, a message per broken invariant."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from liveweight.formats import Bitmap
from liveweight.formats.bitmap import bitmap_gather


def sparse(N: int, K: int, density: float, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(N, K) * (torch.rand(N, K) < density)).to(dtype)


@pytest.mark.parametrize("size", [(64, 256), (33, 129), (1, 1), (0, 5), (5, 0), (31, 300)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(size, density, dtype):
    weight = sparse(*size, density, dtype)
    packed = Bitmap.from_dense(weight).validate()
    assert torch.equal(packed.to_dense(), weight) and packed.to_dense().dtype == dtype
    assert torch.equal(packed.mask(), weight != 0)
    assert packed.density == (int((weight != 0).sum()) / weight.numel() if weight.numel() else 0.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70), st.integers(0, 270), st.floats(0, 1), st.integers(0, 2**31))
def test_round_trip_of_any_mask(N, K, density, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator).round()  # zeros among what is kept
    mask = torch.rand(N, K, generator=generator) < density
    packed = Bitmap.from_dense(weight, mask).validate()
    assert torch.equal(packed.to_dense(), torch.where(mask, weight, 0))
    assert torch.equal(packed.mask(), mask)
    assert packed.values.numel() % 8 == 0 and packed.offsets[-1] * 8 == packed.values.numel()
    dense = torch.randn(N, K, generator=generator)
    gathered = bitmap_gather(dense, packed.bits, packed.offsets, packed.values.numel())
    again = dataclasses.replace(packed, values=gathered)
    assert torch.equal(again.to_dense(), torch.where(mask, dense, 0))
    assert int(gathered.count_nonzero()) <= int(mask.sum())


def test_layout_is_that_of_the_fragments():
    # row = 16 m + 8 half + g, column = 32 pair + 8 t + 4 step + i
    places = [(0, 0), (0, 3), (3, 8), (8, 0), (16, 1), (0, 4), (31, 127), (32, 0), (0, 128)]
    weight = torch.zeros(40, 140)
    for number, (row, column) in enumerate(places):
        weight[row, column] = number + 1
    packed = Bitmap.from_dense(weight)
    # Tiles: rows 0-31 with columns 0-127 and 128-255, then rows 32-63.
    assert packed.offsets.tolist() == [0, 1, 2, 3, 3] and packed.most == 1
    assert packed.values.tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 9, *[0] * 7, 8, *[0] * 7]
    set_bits = {
        (word, bit)
        for word, value in enumerate(packed.bits[0].tolist())
        for bit in range(32)
        if value >> bit & 1
    }
    expected = set()
    for row, column in places[:7]:
        h = ((column // 32 * 2 + column % 8 // 4) * 2 + row // 16) * 2 + row % 16 // 8
        lane = row % 8 * 4 + column % 32 // 8
        expected.add((4 * h + lane // 8, 8 * (column % 4) + lane % 8))
    assert set_bits == expected


def test_bytes_are_two_for_each_kept_weight_and_a_bit_for_each():
    packed = Bitmap.from_dense(sparse(256, 1024, 0.5, torch.bfloat16))
    tiles = 8 * 8
    assert packed.nbytes == 2 * packed.values.numel() + tiles * 512 + (tiles + 1) * 4
    assert packed.nbytes < 256 * 1024 * (2 * packed.density + 1 / 8) * 1.01


def test_negative_zero_is_zero_and_masks_store_zeros():
    assert Bitmap.from_dense(torch.full((4, 4), -0.0)).values.numel() == 0
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = True
    assert torch.equal(Bitmap.from_dense(torch.zeros(4, 4), mask).mask(), mask)


def test_to_dense_is_differentiable_in_values():
    packed = Bitmap.from_dense(sparse(40, 130, 0.3, torch.float64))
    values = packed.values.clone().requires_grad_()
    weight = torch.randn(40, 130, dtype=torch.float64)
    (dataclasses.replace(packed, values=values).to_dense() * weight).sum().backward()
    expected = bitmap_gather(weight, packed.bits, packed.offsets, values.numel())
    assert torch.equal(values.grad, expected)


def test_messages_of_from_dense():
    weight = torch.ones(4, 4)
    for error, message, args in [
        (ValueError, "2 dimensions", (torch.ones(4),)),
        (TypeError, "must be a tensor", ([[1.0]],)),
        (TypeError, "floating point", (weight.int(),)),
        (TypeError, "bool", (weight, weight)),
        (ValueError, "mask must have shape", (weight, torch.ones(2, 2) > 0)),
    ]:
        with pytest.raises(error, match=message):
            Bitmap.from_dense(*args)


def test_validate_finds_what_is_broken():
    packed = Bitmap.from_dense(torch.ones(5, 5))  # 25 values in 32
    tail, bits = packed.values.clone(), packed.bits.clone()
    tail[30] = 1.0
    bits[0, -1] = 1  # row 30
    for error, message, change in [
        (ValueError, "values must be zero behind", {"values": tail}),
        (ValueError, "values must have shape", {"values": packed.values[8:]}),
        (TypeError, "floating point", {"values": packed.values.int()}),
        (TypeError, "bits must be int32", {"bits": packed.bits.long()}),
        (ValueError, r"bits must be \(1, 128\)", {"bits": packed.bits[:, 1:]}),
        (ValueError, "outside of the shape", {"bits": bits}),
        (TypeError, "offsets must be int32", {"offsets": packed.offsets.long()}),
        (ValueError, r"offsets must be \(2,\)", {"offsets": packed.offsets[1:]}),
        (ValueError, "count different values", {"offsets": packed.offsets + 1}),
        (ValueError, "count different values", {"offsets": packed.offsets * 2}),
        (ValueError, "most must be 4, got 3", {"most": 3}),
        (ValueError, r"shape must be \(N, K\)", {"shape": (5,)}),
        (ValueError, "outside of the shape", {"shape": (4, 5)}),
    ]:
        with pytest.raises(error, match=message):
            dataclasses.replace(packed, **change).validate()


@pytest.mark.gpu
def test_packs_on_the_gpu(gpu):
    weight = sparse(300, 1000, 0.4, torch.bfloat16)
    here, there = Bitmap.from_dense(weight), Bitmap.from_dense(weight.to(gpu)).validate()
    assert there.device.type == "cuda" and there.most == here.most
    for name in ("values", "bits", "offsets"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
    assert torch.equal(there.to_dense().cpu(), weight)
