"""benchmarks/tune.py without a GPU: its choice, what it writes, and the products it times."""

from __future__ import annotations

import importlib
import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="triton is not installed")

from liveweight.kernels import tile_table, tiles  # noqa: E402
from liveweight.kernels.tile_candidates import candidates  # noqa: E402

ARCHS = (80, 86, 89, 90, 100)
GOOD, BETTER, BAD = ((m, 64, 64, 4, 3) for m in (16, 32, 64))


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tune")


@pytest.fixture
def world(tune, monkeypatch):
    """A table of one op, three candidates, and a clock that prefers the larger tile."""
    rows = [(2, (64, 512, 512), 1.0, GOOD), (4, (64, 512, 512), 1.0, GOOD)]
    table = {"op": {90: rows}, "other": {90: [(2, (1, 1, 1), 1.0, GOOD)]}}
    monkeypatch.setattr(tune, "candidates", lambda *_: [tiles.Tile(*t) for t in (BETTER, BAD)])
    monkeypatch.setattr(tune.tile_table, "TABLE", table)
    monkeypatch.setattr(tiles, "TABLE", table)

    def timer(calls, sets, rounds):
        for call in calls.values():
            call(sets - 1)
        return {t: tune.Timing(1000 / t.m, 0, 0) for t in calls}

    def make(op, item_bytes, shape, density):
        def run(tile, i):
            if tile.m == 64 and item_bytes == 4:
                raise tune.triton.OutOfResources(300, 200, "shared memory")
            return torch.full((2,), 1.5 if tile.m == 64 else 1.0)

        return tune.Problem(run, torch.ones(2), 3)

    return table, timer, make


def test_the_fastest_right_tile_is_taken_and_a_wrong_one_never(tune, world, capsys):
    table, timer, make = world
    tuned, wrong = tune.tune(table, ["op"], 90, timer, make)
    assert wrong and "WRONG Tile(m=64" in capsys.readouterr().out
    assert [row[3] for row in tuned["op"][90]] == [BETTER, BETTER]
    assert [row[:3] for row in tuned["op"][90]] == [row[:3] for row in table["op"][90]]
    assert tuned["other"] == table["other"] and table["op"][90][0][3] == GOOD


def test_a_gain_within_the_margin_changes_nothing(tune, world):
    table, _, make = world

    def timer(calls, sets, rounds):
        return {t: tune.Timing(100.0 if t.m == 16 else 99.0, 0, 0) for t in calls}

    tuned, _ = tune.tune(table, ["op"], 90, timer, make)
    assert tuned == table


def test_an_architecture_without_rows_gets_those_that_serve_it(tune, world):
    table, timer, make = world
    tuned, _ = tune.tune(table, ["op"], 100, timer, make)
    assert tuned["op"][90] == table["op"][90]
    assert [row[3] for row in tuned["op"][100]] == [BETTER, BETTER]


def test_the_file_is_rewritten_and_its_difference_printed(tune, world, tmp_path, capsys):
    _, timer, make = world
    path = tmp_path / "tile_table.py"
    text = tune.render(tune.TABLE.read_text(), tune.tile_table.TABLE, {})
    path.write_text(text)
    assert tune.retune(path, ["op"], 90, True, timer, make) == 1
    printed = capsys.readouterr().out
    assert f"-            (2, (64, 512, 512), 1.0, {GOOD})," in printed
    assert f"+            (2, (64, 512, 512), 1.0, {BETTER})," in printed
    assert path.read_text() == text, "a dry run wrote"
    tune.retune(path, ["op"], 90, False, timer, make)
    written = {}
    exec(path.read_text(), written)
    assert written["TABLE"]["op"][90][0][3] == BETTER
    assert written["TABLE"]["other"] == tune.tile_table.TABLE["other"]
    assert "Triton" in written["MEASURED"]["op"][90] and set(written["MEASURED"]) == {"op"}


def test_the_table_in_the_tree_is_as_the_script_writes_it(tune):
    text = tune.TABLE.read_text()
    assert tune.render(text, tile_table.TABLE, tile_table.MEASURED) == text


def test_without_a_gpu_it_says_so(tune, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(["--op", "masked_linear"])
    assert "tiles are timed on a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("op", sorted(tile_table.TABLE))
def test_every_row_has_candidates_that_fit(op):
    for arch in ARCHS:
        for item_bytes, shape, density, _ in tile_table.TABLE[op][tiles.section_of(op, arch)]:
            found = candidates(op, shape, density, item_bytes, arch)
            assert 2 <= len(found) <= 64 and len(set(found)) == len(found)
            for tile in found:
                step = (tile.m + tile.n) * tile.k * item_bytes
                assert tile.stages * step <= tiles.shared_limit(arch)
                assert tile.m * tile.n <= 128 * 32 * tile.warps
                assert arch >= 90 or not tile.tma
                assert "/" not in op or tile.n == int(op.split("/")[1])


def test_unknown_ops_are_named(tune):
    with pytest.raises(ValueError, match="no tiles are known for nothing"):
        candidates("nothing", (1, 1, 1), 1.0, 2, 90)
    with pytest.raises(ValueError, match="no problem is known for nothing"):
        tune.build("nothing", 2, (1, 1, 1), 1.0, "cpu", 0)


# The smallest problem of every family, in the interpreter: that its operands, its result and its
# launch belong together.
SMALL = {
    "masked_linear": (16, 64, 64),
    "masked_linear_grad_x": (16, 64, 64),
    "masked_linear_grad_weight": (32, 64, 32),
    "block_linear/16": (16, 32, 64),
    "block_linear_narrow/16": (16, 32, 64),
    "block_linear_grad_values/16": (32, 64, 32),
    "block_conv2d/16": (16, 32, 16 * 9),
    "block_conv2d_grad_values/16": (16, 32, 16 * 9),
}


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")
@pytest.mark.parametrize("op", sorted(SMALL))
def test_problems_are_what_their_kernels_compute(tune, op):
    assert {o.split("/")[0] for o in SMALL} == {o.split("/")[0] for o in tile_table.TABLE}
    problem = tune.build(op, 4, SMALL[op], 0.5, "cpu", 0)
    tile = tiles.Tile(16, 32 if op.startswith("masked") else 16, 32, 4, 2)
    assert tune.usable(problem, [tile], 1e-5) == ([tile], [])
    right, notes = tune.usable(
        tune.Problem(problem.run, problem.want + 1, problem.sets), [tile], 1e-5
    )
    assert right == [] and "WRONG" in notes[0]
