"""The schedule of kept blocks: its parts, its order of equals, its checks."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from liveweight._packing import csr_pattern
from liveweight.formats.schedule import check_schedule, make_schedule


def split(schedule: torch.Tensor, rows: int, width: int, kept: int) -> list[list[int]]:
    return [part.tolist() for part in schedule.split([rows, width, width + 1, kept, kept])]


def test_parts_of_a_small_pattern():
    kept = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    row_offsets, columns = csr_pattern(kept)
    schedule = make_schedule(row_offsets, columns, 3)
    assert schedule.dtype == torch.int32
    order, turned_order, offsets, blocks, rows = split(schedule, 4, 3, 6)
    assert order == [1, 3, 0, 2]
    assert turned_order == [0, 1, 2]  # equals keep their order
    assert offsets == [0, 2, 4, 6]
    assert blocks == [0, 1, 2, 4, 3, 5]
    assert rows == [0, 1, 1, 3, 1, 3]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.floats(0, 1), st.integers(0, 2**31 - 1))
def test_turned_list_is_the_transposed_pattern(rows, width, density, seed):
    kept = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < density
    row_offsets, columns = csr_pattern(kept)
    turned_offsets, turned_rows = csr_pattern(kept.t().contiguous())
    schedule = make_schedule(row_offsets, columns, width)
    parts = split(schedule, rows, width, columns.numel())
    order, turned_order, offsets, blocks, rows_of = parts
    assert offsets == turned_offsets.tolist() and rows_of == turned_rows.tolist()
    places = [columns[b].item() for b in blocks]
    assert places == sorted(places) and sorted(blocks) == list(range(columns.numel()))
    for sequence, counts in ((order, kept.sum(1)), (turned_order, kept.sum(0))):
        assert sequence == sorted(range(len(sequence)), key=lambda i: -int(counts[i]))
    check_schedule("here", schedule, row_offsets, columns, width)


def test_messages():
    row_offsets, columns = csr_pattern(torch.ones(2, 3, dtype=torch.bool))
    schedule = make_schedule(row_offsets, columns, 3)
    for error, message, broken in [
        (TypeError, "schedule must be int32, got int64", schedule.long()),
        (ValueError, r"shape \(21,\), got \(20,\)", schedule[1:]),
        (ValueError, r"make_schedule\(row_offsets, columns, 3\)", schedule.flip(0)),
        (ValueError, "schedule on meta, columns on cpu", schedule.to("meta")),
    ]:
        with pytest.raises(error, match=message):
            check_schedule("here", broken, row_offsets, columns, 3)
