"""Block: packing round trips, its choice of blocks, its invariants and messages."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from liveweight.formats import Block
from liveweight.formats.block import GPU_COSTS

BLOCKS = [(16, 1), (8, 8), (16, 16), (32, 32), (5, 3), (1, 1), (128, 128)]


def block_sparse(N: int, K: int, block: tuple[int, int], density: float) -> torch.Tensor:
    bh, bw = block
    kept = torch.rand(-(-N // bh), -(-K // bw)) < density
    kept = kept.repeat_interleave(bh, 0).repeat_interleave(bw, 1)[:N, :K]
    return torch.randn(N, K) * kept


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", [(64, 96), (33, 47), (1, 1), (0, 5), (5, 0)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_round_trip(size, block, density):
    weight = block_sparse(*size, block, density)
    packed = Block.from_dense(weight, block=block).validate()
    assert torch.equal(packed.to_dense(), weight)
    assert packed.block == block and packed.shape == size
    assert packed.values.is_contiguous()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40), st.integers(0, 40), st.integers(1, 20), st.integers(1, 20), st.integers()
)
def test_round_trip_of_any_mask(N, K, bh, bw, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    weight = torch.randn(N, K, generator=generator)
    mask = torch.rand(N, K, generator=generator) < 0.1
    packed = Block.from_dense(weight, mask, block=(bh, bw)).validate()
    assert torch.equal(packed.to_dense(), torch.where(mask, weight, 0))
    assert torch.equal(Block.from_dense(weight * mask, block=(bh, bw)).columns, packed.columns)


def test_layout_is_column_after_column():
    weight = torch.arange(1.0, 25.0).reshape(4, 6)
    weight[:2, 3:] = 0
    packed = Block.from_dense(weight, block=(2, 3))
    assert packed.row_offsets.tolist() == [0, 1, 3] and packed.columns.tolist() == [0, 0, 1]
    assert torch.equal(packed.values[2], weight[2:, 3:].t())
    assert packed.density == 0.75
    assert packed.nbytes == 18 * 4 + 3 * 4 + 3 * 4 + (2 + 2 + 3 + 2 * 3) * 4


def test_negative_zero_is_zero_and_masks_store_zeros():
    assert Block.from_dense(torch.full((4, 4), -0.0), block=(2, 2)).columns.numel() == 0
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 0] = True
    assert Block.from_dense(torch.zeros(4, 4), mask, block=(2, 2)).columns.tolist() == [0]


def test_values_can_be_replaced():
    weight = block_sparse(20, 20, (4, 4), 0.5)
    packed = Block.from_dense(weight, block=(4, 4))
    ones = dataclasses.replace(packed, values=torch.ones_like(packed.values))
    assert torch.equal(ones.to_dense() != 0, weight != 0)


@pytest.mark.parametrize("block", [(32, 32), (16, 16), (8, 8), (16, 1)])
def test_best_block_finds_the_pattern(block):
    found, filled = Block.best_block(block_sparse(256, 256, block, 0.3))
    assert found == block and filled == 1.0


def test_best_block_of_scattered_entries_says_how_much_is_wasted():
    weight = torch.zeros(64, 64)
    weight[3, 5] = weight[40, 50] = 1.0
    assert Block.best_block(weight) == ((16, 1), 2 / 32)
    assert Block.best_block(torch.zeros(4, 4))[1] == 1.0
    assert Block.best_block(weight, [(1, 1), (2, 2)]) == ((1, 1), 1.0)
    with pytest.raises(ValueError, match="at least one candidate"):
        Block.best_block(weight, [])


def test_best_block_by_cost():
    costs = {(2, 2): 1.0, (4, 2): 0.3}
    weight = torch.zeros(8, 8)
    weight[:2] = 1.0
    assert Block.best_block(weight, costs) == ((4, 2), 0.5)  # 32 entries x 0.3 against 16
    assert Block.best_block(weight, {**costs, (4, 2): 0.45}) == ((2, 2), 1.0)  # a near tie
    assert Block.best_block(torch.zeros(8, 8), costs) == ((2, 2), 1.0)


def test_costs_on_a_gpu_choose_taller_panels_where_few_zeros_are_added():
    for block, density, found in [
        ((64, 64), 0.1, (64, 64)),
        ((16, 16), 0.05, (16, 16)),
        ((16, 16), 0.35, (128, 16)),
        ((16, 16), 1.0, (128, 128)),
        ((64, 1), 0.1, (64, 1)),
    ]:
        weight = block_sparse(512, 512, block, density)
        assert Block.best_block(weight, GPU_COSTS)[0] == found


def test_messages_of_from_dense():
    weight = torch.ones(4, 4)
    for error, message, args, block in [
        (TypeError, "two integers", (weight,), (4,)),
        (TypeError, "two integers", (weight,), (4, 4.0)),
        (ValueError, r"\[1, 128\]", (weight,), (0, 4)),
        (ValueError, r"\[1, 128\]", (weight,), (4, 129)),
        (ValueError, "2 dimensions", (torch.ones(4),), (4, 4)),
        (TypeError, "floating point", (weight.int(),), (4, 4)),
        (TypeError, "bool", (weight, weight), (4, 4)),
        (ValueError, "mask must have shape", (weight, torch.ones(2, 2) > 0), (4, 4)),
    ]:
        with pytest.raises(error, match=message):
            Block.from_dense(*args, block=block)


def test_validate_finds_what_is_broken():
    packed = Block.from_dense(torch.ones(5, 5), block=(2, 2))
    outside = packed.values.clone()
    outside[2, 1, 0] = 1.0  # column 5 of 5
    for error, message, change in [
        (ValueError, "values must be zero outside", {"values": outside}),
        (ValueError, "values must have shape", {"values": packed.values[1:]}),
        (ValueError, r"\[kept, bw, bh\]", {"values": packed.values.flatten()}),
        (TypeError, "floating point", {"values": packed.values.int()}),
        (TypeError, "columns must be int32", {"columns": packed.columns.long()}),
        (ValueError, "columns must be in", {"columns": packed.columns + 1}),
        (ValueError, "increase strictly", {"columns": packed.columns * 0}),
        (ValueError, "row_offsets must start at 0", {"row_offsets": packed.row_offsets + 1}),
        (ValueError, "row_offsets", {"shape": (8, 5)}),
        (ValueError, "shape must be", {"shape": (5,)}),
        (ValueError, "schedule must be make_schedule", {"schedule": packed.schedule.flip(0)}),
        (ValueError, "schedule must have shape", {"schedule": packed.schedule[1:]}),
        (TypeError, "schedule must be int32", {"schedule": packed.schedule.long()}),
    ]:
        with pytest.raises(error, match=message):
            dataclasses.replace(packed, **change).validate()
