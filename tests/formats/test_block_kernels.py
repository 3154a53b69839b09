"""BlockKernels: packing round trips, its choice of blocks, its invariants and messages."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from liveweight.formats import BlockKernels
from liveweight.formats.block_kernels import GPU_COSTS
from liveweight.formats.schedule import make_schedule


def block_sparse(shape, block, density: float) -> torch.Tensor:
    rows, width = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    kept = torch.rand(rows, width) < density
    kept = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return torch.randn(shape) * kept[: shape[0], : shape[1], None, None]


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 2**31 - 1),
)
def test_round_trip_of_any_mask(shape, block, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.1
    packed = BlockKernels.from_dense(weight, mask, block=block).validate()
    assert torch.equal(packed.to_dense(), torch.where(mask, weight, 0))
    assert packed.block == block and packed.shape == shape and packed.values.is_contiguous()
    twin = BlockKernels.from_dense(weight * mask, block=block)
    assert torch.equal(twin.columns, packed.columns) and torch.equal(twin.values, packed.values)
    width = -(-shape[1] // block[1])
    order = make_schedule(packed.row_offsets, packed.columns, width)
    assert torch.equal(packed.schedule, order)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 12), st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_masks_of_kernels_and_of_entries_agree(filters, channels, block, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(filters, channels, 2, 3, generator=generator)
    kernels = torch.rand(filters, channels, generator=generator) < 0.3
    packed = BlockKernels.from_dense(weight, kernels, block=block)
    entries = kernels[:, :, None, None].expand(weight.shape)
    assert torch.equal(packed.values, BlockKernels.from_dense(weight, entries, block=block).values)
    assert torch.equal(packed.to_dense(), torch.where(entries, weight, 0))


def test_layout_is_tap_after_tap_then_channel_after_channel():
    weight = torch.arange(1.0, 1 + 4 * 6 * 2).reshape(4, 6, 1, 2)
    weight[:2, 3:] = 0
    packed = BlockKernels.from_dense(weight, block=(2, 3))
    assert packed.row_offsets.tolist() == [0, 1, 3] and packed.columns.tolist() == [0, 0, 1]
    for tap in (0, 1):
        assert torch.equal(packed.values[2, tap], weight[2:, 3:, 0, tap].t())
    assert packed.density == 0.75
    # row_offsets 3, columns 3; schedule: 2 rows, 2 columns, 3 offsets, 2 x 3 blocks.
    assert packed.nbytes == 36 * 4 + 3 * 4 + 3 * 4 + (2 + 2 + 3 + 6) * 4


def test_negative_zero_is_zero_and_masks_store_zeros():
    zeros = torch.full((4, 4, 2, 2), -0.0)
    assert BlockKernels.from_dense(zeros, block=(2, 2)).columns.numel() == 0
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 0] = True
    assert BlockKernels.from_dense(zeros, mask, block=(2, 2)).columns.tolist() == [0]


def test_gradients_reach_the_values_through_the_dense_weight():
    packed = BlockKernels.from_dense(block_sparse((4, 6, 3, 3), (2, 3), 0.5), block=(2, 3))
    values = packed.values.clone().requires_grad_()
    dataclasses.replace(packed, values=values).to_dense().pow(2).sum().backward()
    assert torch.equal(values.grad, 2 * packed.values)


@pytest.mark.parametrize("block", [(64, 64), (64, 16), (32, 32), (16, 16)])
def test_best_block_finds_the_pattern(block):
    weight = block_sparse((256, 256, 1, 1), block, 0.4)
    assert BlockKernels.best_block(weight) == (block, 1.0)


def test_best_block_of_scattered_kernels_and_groups():
    weight = torch.zeros(64, 64, 3, 3)
    weight[3, 5] = weight[40, 50] = 1.0
    assert BlockKernels.best_block(weight) == ((16, 16), 2 / 512)
    assert BlockKernels.best_block(torch.zeros(4, 4, 1, 1))[1] == 1.0
    full = torch.ones(64, 16, 1, 1)
    assert BlockKernels.best_block(full)[0] == (64, 16)
    assert BlockKernels.best_block(full, groups=2)[0] == (32, 16)
    with pytest.raises(ValueError, match="divide 64 filters / 8 groups"):
        BlockKernels.best_block(full, groups=8)
    with pytest.raises(ValueError, match="at least one candidate"):
        BlockKernels.best_block(full, [])


def test_best_block_counts_costs():
    weight = block_sparse((256, 256, 1, 1), (16, 16), 0.4)
    costs = {(16, 16): 1.0, (64, 16): 0.5}
    assert BlockKernels.best_block(weight, costs)[0] == (16, 16)  # twice the entries at half cost
    costs[64, 16] = 0.2
    assert BlockKernels.best_block(weight, costs)[0] == (64, 16)
    # Panels of one height: what reads the fewest entries.
    one_height = {block: cost for block, cost in GPU_COSTS.items() if block[0] == 16}
    assert BlockKernels.best_block(weight, one_height) == ((16, 16), 1.0)
    assert GPU_COSTS[64, 16] < GPU_COSTS[16, 16]


def test_messages_of_from_dense():
    weight = torch.ones(4, 4, 1, 1)
    for error, message, args, block in [
        (TypeError, "BlockKernels: block must be two integers", (weight,), (4, 4.0)),
        (ValueError, r"BlockKernels: sides .* \[1, 128\]", (weight,), (4, 129)),
        (ValueError, "4 dimensions", (torch.ones(4, 4),), (4, 4)),
        (TypeError, "floating point", (weight.int(),), (4, 4)),
        (TypeError, "bool", (weight, weight), (4, 4)),
        (ValueError, "mask must have shape", (weight, torch.ones(2, 2) > 0), (4, 4)),
    ]:
        with pytest.raises(error, match=message):
            BlockKernels.from_dense(*args, block=block)


def test_validate_finds_what_is_broken():
    packed = BlockKernels.from_dense(torch.ones(5, 5, 1, 2), block=(2, 2))
    outside = packed.values.clone()
    outside[2, 0, 1, 0] = 1.0  # channel 5 of 5
    for error, message, change in [
        (ValueError, "values must be zero outside", {"values": outside}),
        (ValueError, "values must have shape", {"values": packed.values[1:]}),
        (ValueError, r"\[kept, kh \* kw, bc, bo\]", {"values": packed.values.flatten()}),
        (TypeError, "floating point", {"values": packed.values.int()}),
        (TypeError, "columns must be int32", {"columns": packed.columns.long()}),
        (ValueError, "columns must be in", {"columns": packed.columns + 1}),
        (ValueError, "increase strictly", {"columns": packed.columns * 0}),
        (ValueError, "row_offsets must start at 0", {"row_offsets": packed.row_offsets + 1}),
        (ValueError, "row_offsets", {"shape": (8, 5, 1, 2)}),
        (ValueError, "shape must be", {"shape": (5, 5)}),
        (ValueError, "schedule must", {"schedule": packed.schedule.flip(0)}),
        (TypeError, "schedule must be int32", {"schedule": packed.schedule.long()}),
    ]:
        with pytest.raises(error, match=message):
            dataclasses.replace(packed, **change).validate()
