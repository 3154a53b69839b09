"""The burden study on a few digits, and its verdicts on made-up rows."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest

from liveweight import prune
from liveweight.runs.data import load_data
from liveweight.runs.models import build_model
from liveweight.runs.recipe import DataRecipe, RecipeError
from liveweight.studies.burden import BURDEN, DENSE_LAYERS, BurdenOptions, cells
from liveweight.studies.burden_verdicts import verdicts
from liveweight.studies.grid import run_study

OPTIONS = BurdenOptions(
    seeds=[0],
    data=DataRecipe(limit=60, validation=40),
    sparsities=[0.5, 0.9],
    patch=14,
    width=16,
    epochs=3,
    batch_size=20,
    every=2,
    samples=30,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_study(BURDEN, OPTIONS, tmp_path_factory.mktemp("burden") / "run")


@pytest.fixture(scope="module")
def rows(folder):
    return {(e["cell"]["sparsity"], e["cell"]["relief"]): e["row"] for e in folder.entries()}


def test_cells_are_two_dense_nets_and_every_relief_at_every_sparsity():
    found = cells(dataclasses.replace(OPTIONS, seeds=[3, 4]))
    assert len(found) == 2 * (2 + 2 * 4)
    assert [c["relief"] for c in found if c["sparsity"] == 0 and c["seed"] == 3] == [
        "none",
        "merge",
    ]
    assert {c["relief"] for c in found if c["sparsity"] == 0.9} == {
        "none",
        "merge",
        "dynamic",
        "both",
    }


def test_every_layer_of_the_blocks_has_its_sparsity_and_the_others_stay_dense(rows):
    for (sparsity, _), row in rows.items():
        assert len(row["layers"]) == 16
        assert row["density"] == pytest.approx(1 - sparsity, abs=0.01)
        for name, density, *_ in row["layers"]:
            assert name.startswith("blocks.") and density == pytest.approx(1 - sparsity, abs=0.01)
        assert 0 <= row["accuracy"] <= 1 and row["loss"] > 0


def test_a_dense_net_bears_what_it_bore_and_a_pruned_one_is_weighed_against_its_twin(rows, folder):
    for relief in ("none", "merge"):
        assert rows[0.0, relief]["burden"] == pytest.approx(1)
        assert rows[0.0, relief]["error"] == 0
    assert all(row["error"] > 0 for (sparsity, _), row in rows.items() if sparsity)
    assert {file.stem for file in (folder.path / "cache").iterdir()} == {
        "dense-plain-0",
        "dense-merge-0",
    }
    assert rows[0.0, "none"]["loss"] != rows[0.0, "merge"]["loss"]


def test_what_the_choice_alone_does_is_the_burden_of_the_twin_once_cut(rows, folder):
    tensors, _ = folder.cached("dense-merge-0", lambda: pytest.fail("it is there"))
    twin = build_model("vit4", {"patch": 14, "width": 16, "merge": 0.5})
    twin.load_state_dict(tensors)
    cut = copy.deepcopy(twin)
    prune.prune_(cut, importance="magnitude", sparsity=0.9, ignore=DENSE_LAYERS)
    inputs = load_data(OPTIONS.data).validation.inputs[:30]
    expected = prune.burden(cut, twin, [inputs], ignore=DENSE_LAYERS).network.burden
    assert rows[0.9, "both"]["burden_cut"] == pytest.approx(expected, rel=1e-5)
    assert rows[0.9, "both"]["burden"] != pytest.approx(expected, rel=1e-5)


def test_dropped_weights_return_only_under_dynamic_masks(rows):
    for sparsity in OPTIONS.sparsities:
        assert rows[sparsity, "none"]["returned"] == rows[sparsity, "merge"]["returned"] == 0
        assert rows[sparsity, "dynamic"]["returned"] > 0 and rows[sparsity, "both"]["returned"] > 0
        masks = {rows[sparsity, r]["mask"] for r in ("none", "merge", "dynamic", "both")}
        assert len(masks) == 4 and all(len(mask) == 64 for mask in masks)


def test_missing_cells_come_out_the_same_again(folder, rows):
    entries = folder.entries()
    for file in sorted((folder.path / "cells").glob("*relief-both*")):
        file.unlink()
    (folder.path / "cache" / "dense-merge-0.safetensors").unlink()
    again = run_study(BURDEN, OPTIONS, folder.path)
    assert [e["row"] for e in again.entries()] == [e["row"] for e in entries]


def test_the_page_shows_every_relief_and_what_is_our_own(folder):
    text = (folder.path / "README.md").read_text()
    for words in ("| neither", "token merging", "dynamic masks", "both reliefs", "cut alone"):
        assert words in text
    assert "what was removed" in text and "undecided" in text, "one seed decides nothing"
    assert "formulas and settings\nare not public" in text
    pytest.importorskip("matplotlib")
    assert (folder.path / "burden.png").stat().st_size > 5000 and "(burden.png)" in text


def made_up(**changes):
    """Rows of two seeds; changes: {relief_sparsity: (burden, accuracy)}."""
    values = {"none_0.0": (1.0, 0.9), "none_0.8": (1.5, 0.8), "none_0.9": (2.0, 0.6)}
    values |= {"merge_0.9": (1.6, 0.7), "dynamic_0.9": (2.0, 0.6), "both_0.9": (2.4, 0.5)}
    found = []
    for key, (burden, accuracy) in (values | changes).items():
        relief, _, sparsity = key.partition("_")
        for seed in (0, 1):
            row = {"sparsity": float(sparsity), "relief": relief, "seed": seed}
            row |= {"burden": burden + 0.01 * seed, "accuracy": accuracy + 0.004 * seed}
            row["burden_cut"] = row["burden"] - (0.2 if seed else 0.21)
            found.append(row)
    return found


def test_verdicts_follow_paired_differences():
    found = {claim.text: claim for claim in verdicts(made_up())}
    assert len(found) == 8
    exists = found["neural burden exists: it rises with sparsity"]
    assert exists.holds is True and "1.50 at 0.8" in exists.seen
    assert found["what is left makes up for what was removed"].holds is True
    merging = found["accuracy at high sparsity (0.9) recovers with token merging"]
    assert merging.holds is True
    assert "+10.00 points" in merging.seen and "lost 30.00" in merging.seen
    assert found["the burden at 0.9 falls with token merging"].holds is True
    assert found["accuracy at high sparsity (0.9) recovers with both together"].holds is False
    assert found["the burden at 0.9 falls with both together"].holds is False
    assert found["accuracy at high sparsity (0.9) recovers with dynamic masks"].holds is None


def test_burden_that_falls_somewhere_does_not_rise():
    (claim, *_) = verdicts(made_up(**{"none_0.8": (2.5, 0.8)}))
    assert claim.holds is False
    (claim, *_) = verdicts(made_up(**{"none_0.8": (2.0, 0.8)}))
    assert claim.holds is None


def test_claims_without_rows_are_left_out():
    rows = made_up()
    assert verdicts([r for r in rows if r["sparsity"] == 0]) == []
    few = verdicts([r for r in rows if r["sparsity"] != 0.8 and r["relief"] in ("none", "merge")])
    assert [claim.text.split()[0] for claim in few] == ["what", "accuracy", "the"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsities": []}, "sparsities must be different numbers inside"),
        ({"sparsities": [0.5, 1.0]}, r"inside \(0, 1\), got \[0.5, 1.0\]"),
        ({"sparsities": [0.5, 0.5]}, "sparsities must be different"),
        ({"begin": 0.6, "end": 0.5}, "begin < end <= 1, got begin 0.6, end 0.5"),
        ({"merge": 0.6}, r"merge must be in \(0, 0.5\], got 0.6"),
        ({"scope": "model"}, "scope must be layer or global, got 'model'"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
    ],
)
def test_options_that_cannot_be_run(changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        run_study(BURDEN, dataclasses.replace(OPTIONS, **changes), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_inputs_that_are_no_square_images(tmp_path):
    path = tmp_path / "flat.npz"
    x, y = np.ones((40, 8), np.float32), np.arange(40) % 2
    np.savez(path, train_x=x, train_y=y, test_x=x, test_y=y)
    options = dataclasses.replace(
        OPTIONS, data=DataRecipe(source="numpy", path=str(path), validation=10)
    )
    with pytest.raises(ValueError, match=r"square images \[C, S, S\], got inputs \[8\]"):
        run_study(BURDEN, options, tmp_path / "run")
