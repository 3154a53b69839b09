"""The table of tiles: well formed, and pick_tile total and deterministic over it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

tiles = pytest.importorskip("liveweight.kernels.tiles", reason="triton is not installed")
tile_table = pytest.importorskip("liveweight.kernels.tile_table")

ARCHS = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZE = st.integers(0, 2**33)


def power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@given(
    op=st.sampled_from(sorted(tile_table.TABLE)),
    shape=st.tuples(SIZE, SIZE, SIZE),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    arch=st.sampled_from(ARCHS),
)
def test_every_call_gets_one_listed_tile_that_its_device_can_hold(op, shape, density, dtype, arch):
    tile = tiles.pick_tile(op, shape, density, dtype, arch)
    assert tile == tiles.pick_tile.__wrapped__(op, shape, density, dtype, arch)
    assert tile in tiles.listed_tiles(op, arch, dtype.itemsize)
    section = tiles.section_of(op, arch)
    assert section <= arch and tiles.shared_limit(section) <= tiles.shared_limit(arch)
    # What the compiler makes of each row of a section, to the byte, is test_aot.py's.
    assert (tile.m + tile.n) * tile.k * dtype.itemsize <= tiles.shared_limit(arch)


@pytest.mark.parametrize("op", sorted(tile_table.TABLE))
def test_rows_are_well_formed(op):
    sections = tile_table.TABLE[op]
    assert {80, 86, 90} <= set(sections) <= set(ARCHS)
    for arch, rows in sections.items():
        assert {row[0] for row in rows} == {2, 4}, (op, arch)
        places = [row[:3] for row in rows]
        assert len(set(places)) == len(places), f"{op} on {arch} lists one place twice"
        for _, shape, density, fields in rows:
            tile = tiles.Tile(*fields)
            assert len(shape) == 3 and min(shape) > 0 and 0 < density <= 1
            assert all(map(power_of_two, (tile.m, tile.n, tile.k, tile.warps)))
            assert min(tile.m, tile.n, tile.k) >= 16 and tile.stages >= 1 and tile.split >= 1
            assert arch >= 90 or not tile.tma, f"{op} on {arch} has no tensor descriptors"


def test_the_nearest_row_wins_and_a_tie_goes_to_the_first(monkeypatch):
    near, far, sparse = (16, 16, 16, 4, 1), (32, 16, 16, 4, 1), (64, 16, 16, 4, 1)
    rows = [
        (2, (16, 64, 64), 1.0, near),
        (2, (256, 64, 64), 1.0, far),
        (2, (256, 64, 64), 0.05, sparse),
    ]
    monkeypatch.setitem(tiles.TABLE, "test", {80: rows})

    def picked(M, density):
        return tiles.pick_tile("test", (M, 64, 64), density, torch.float16, 80).m

    assert [picked(M, 1.0) for M in (0, 1, 63, 64, 65, 10**6)] == [16, 16, 16, 16, 32, 32]
    assert [picked(256, d) for d in (1.0, 0.5, 0.1, 0.0)] == [32, 32, 64, 64]
    assert [t.m for t in tiles.listed_tiles("test", 80, 2)] == [16, 32, 64]


def test_sections_never_ask_more_shared_memory_than_the_device_has():
    assert [tiles.section_of("masked_linear", arch) for arch in (80, 86, 87, 90, 100)] == [
        80, 86, 86, 90, 90,
    ]  # fmt: skip
    # 12.0 is newer than 9.0 but has the shared memory of 8.6 and 8.9.
    assert tiles.section_of("masked_linear", 120) in (86, 89)


def test_what_has_no_tile_is_named():
    args = ((1, 1, 1), 1.0)
    with pytest.raises(ValueError, match="no tile for masked_linear on compute capability 75"):
        tiles.pick_tile("masked_linear", *args, torch.float32, 75)
    with pytest.raises(ValueError, match="no tile for masked_linear with torch.float64"):
        tiles.pick_tile("masked_linear", *args, torch.float64, 80)
    with pytest.raises(ValueError, match="no tile for nothing"):
        tiles.pick_tile("nothing", *args, torch.float16, 80)
