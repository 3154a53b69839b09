"""The comparison of pruning methods: what is cut, counted, trained, claimed and written."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from liveweight import prune
from liveweight.runs.models import build_model
from liveweight.runs.recipe import RecipeError
from liveweight.studies import comparison_methods as methods
from liveweight.studies.comparison import COMPARISON, ComparisonOptions, cells
from liveweight.studies.comparison_page import best_within
from liveweight.studies.comparison_verdicts import (
    difference,
    per_seed,
    rivals,
    verdicts,
    which_reading,
)
from liveweight.studies.grid import StudyFolder, run_study

ON_WEIGHTS = [name for name, m in methods.METHODS.items() if "weight" in m.granularities]


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3)
    ).eval()


@pytest.fixture
def data() -> list:
    return [(torch.randn(20, 12), torch.randint(0, 3, (20,))) for _ in range(2)]


def cut(net, method, data, granularity="weight", sparsity=0.5, importance=None):
    importance = importance or methods.METHODS[method].make(0, 64)
    place = {"granularity": granularity, "sparsity": sparsity, "scope": "layer"}
    return methods.cut_(net, method, importance, data, **place)


@pytest.mark.parametrize("method", ON_WEIGHTS)
def test_every_method_keeps_as_many_weights(net, data, method):
    cut(net, method, data)
    assert [int(m.sum()) for m in prune.masks(net).values()] == [60, 30, 9]


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_leaves_the_same_widths_and_the_classes(net, data, method):
    cut(net, method, data, "neuron")
    small = methods.smaller(net, data[0][0])
    assert methods.widths(small) == [5, 3, 3]
    assert not prune.masks(small)
    torch.testing.assert_close(small(data[0][0]), net(data[0][0]))


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
@pytest.mark.parametrize("method", [n for n, m in methods.METHODS.items() if m.scored_once])
def test_scores_of_the_dense_net_give_the_method_s_own_masks(net, data, method, granularity):
    if granularity not in methods.METHODS[method].granularities:
        pytest.skip("this method scores whole units")
    twin = copy.deepcopy(net)
    scores = methods.connection_scores(method, net, data, seed=0, masks=64)
    given = cut(net, method, data, granularity, importance=methods.Given(scores))
    assert cut(twin, method, data, granularity) == given
    before = prune.masks(net)
    assert all(torch.equal(mask, before[name]) for name, mask in prune.masks(twin).items())


def test_merging_removes_what_magnitude_does_and_changes_the_rest(net, data):
    plain, merged = copy.deepcopy(net), copy.deepcopy(net)
    assert cut(plain, "magnitude", data, "neuron") == cut(merged, "merging", data, "neuron")
    assert torch.equal(plain[0].weight, merged[0].weight)
    assert not torch.equal(plain[2].weight, merged[2].weight)


def test_masks_hash_tells_masks_apart_and_names_them(net):
    masks = {"0.weight": torch.ones(10, 12, dtype=torch.bool)}
    masks["0.weight"][0, 0] = False
    prune.apply_masks_(net, masks)
    first = methods.masks_hash(net)
    assert first == methods.masks_hash(copy.deepcopy(net))
    masks["0.weight"][0] = torch.tensor([True, False] + [True] * 10)
    prune.apply_masks_(net, masks)
    assert methods.masks_hash(net) != first


def test_bytes_of_sparse_dense_and_quantized_weights():
    net = nn.Sequential(nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    assert methods.pruned_bytes(net) == 4 * (512 + 32 + 4)
    keep = torch.zeros(8, 64, dtype=torch.bool)
    keep.flatten()[:100] = True
    prune.apply_masks_(net, {"0.weight": keep})
    assert methods.pruned_bytes(net) == 4 * 100 + 64 + 4 * 36  # 64 bytes of mask bits
    keep.flatten()[5:] = False
    prune.apply_masks_(net, {"0.weight": keep})
    assert methods.pruned_bytes(net) == 4 * 5 + (2 * 5 + 4 * 9) + 4 * 36  # CSR
    keep[:] = True
    prune.apply_masks_(net, {"0.weight": keep})
    assert methods.pruned_bytes(net) == 4 * 548  # a full mask takes no place
    prune.strip_(net)
    rows = prune.quantize_weights_(net, 3)
    assert methods.quantized_bytes(net, rows) == (512 * 3 // 8 + 16) + (32 * 3 // 8 + 8) + 4 * 4


@pytest.mark.parametrize(("sparsity", "bits"), [(0.91, 4), (0.96, 2)])
def test_the_default_sparsities_meet_bit_widths_at_equal_bytes(sparsity, bits):
    assert sparsity in ComparisonOptions().sparsities and bits in ComparisonOptions().bits
    net, twin = build_model("lenet300", seed=0), build_model("lenet300", seed=0)
    prune.prune_(net, importance="magnitude", sparsity=sparsity)
    size = methods.quantized_bytes(twin, prune.quantize_weights_(twin, bits))
    assert 0.92 * size < methods.pruned_bytes(net) <= size


def test_cells_are_every_method_where_it_makes_sense_seed_by_seed():
    options = ComparisonOptions(seeds=[3, 4], sparsities=[0.5, 0.9], neuron_sparsities=[0.5])
    found = cells(options)
    per = {
        g: sum(g in m.granularities for m in methods.METHODS.values()) for g in ("weight", "neuron")
    }
    assert len(found) == 2 * (1 + 5 + 2 * per["weight"] + per["neuron"])
    assert [c["seed"] for c in found] == sorted(c["seed"] for c in found)
    assert not [c for c in found if c["method"] == "merging" and c["granularity"] == "weight"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["magnitud"]}, "'magnitud'.*magnitude"),
        ({"model": "vgg13"}, "model: 'vgg13'"),
        ({"scope": "net"}, "scope: 'net'"),
        ({"sparsities": [1.0]}, "sparsities must be between 0 and 1, got 1.0"),
        ({"neuron_sparsities": [0.0]}, "neuron_sparsities must"),
        ({"bits": [16]}, "bits must be from 2 to 8, got 16"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"dropout_masks": 7}, "dropout_masks must be an even number"),
    ],
)
def test_options_that_cannot_be_run_are_refused(options, words):
    with pytest.raises(RecipeError, match=words):
        cells(ComparisonOptions(**options))


def made_up(tuned: dict, scratch: float, granularity="weight", jitter=(0.0, 0.001, -0.001)):
    """Rows of one sparsity: accuracies after fine-tuning by method, alike from scratch."""
    place = {"granularity": granularity, "sparsity": 0.9, "bytes": 1000, "kept": 10}
    return [
        {"method": method, "seed": seed, "cut": 0.1, **place}
        | {"fine_tuned": value + shift, "scratch": scratch + shift}
        for method, value in tuned.items()
        for seed, shift in enumerate(jitter)
    ]


STD, SLOPE = methods.READINGS


@pytest.mark.parametrize(
    ("tuned", "holds"),
    [
        ({STD: 0.95, SLOPE: 0.90, "obd": 0.94, "magnitude": 0.93}, {STD: True, SLOPE: False}),
        ({STD: 0.94, SLOPE: 0.95, "obd": 0.94, "magnitude": 0.93}, {STD: None, SLOPE: True}),
        ({STD: 0.92, SLOPE: 0.93, "obd": 0.94}, {STD: False, SLOPE: False}),
    ],
)
def test_obd_sd_is_best_where_it_beats_every_rival(tuned, holds):
    rows = made_up(tuned, 0.9)
    for method, claim in zip(methods.READINGS, verdicts(rows)[:2], strict=True):
        assert claim.holds is holds[method], claim
        assert method.removeprefix("obd_sd-") in claim.text
    assert set(rivals(rows, STD, {"granularity": "weight", "sparsity": 0.9})) == set(tuned) - {
        STD,
        SLOPE,
    }
    ahead = max((STD, SLOPE), key=tuned.get).removeprefix("obd_sd-")
    better, words = which_reading(rows)
    assert better == ahead and f"{ahead} is the better reading" in words
    assert ("neither shows the claim" in words) == (True not in holds.values())


@pytest.mark.parametrize(
    ("granularity", "scratch", "holds"),
    [
        ("weight", 0.945, True),  # fine-tuning is half a point better
        ("weight", 0.90, False),  # five points are not slightly
        ("weight", 0.96, False),
        ("neuron", 0.97, True),
        ("neuron", 0.955, False),  # half a point is not much
        ("neuron", 0.90, False),
    ],
)
def test_retraining_claims_know_slightly_from_much(granularity, scratch, holds):
    rows = made_up({"magnitude": 0.95, "random": 0.5}, scratch, granularity)
    (claim,) = verdicts(rows)
    assert claim.holds is holds and "but random" in claim.seen


def test_a_noisy_difference_and_a_single_seed_stay_undecided():
    rows = made_up({"magnitude": 0.95}, 0.945)
    for row, shift in zip(rows, (0.02, -0.02, 0.0), strict=True):
        row["scratch"] += shift
    assert [claim.holds for claim in verdicts(rows)] == [None]
    alone = [row for row in made_up({STD: 0.95, "obd": 0.9}, 0.945) if row["seed"] == 0]
    assert {claim.holds for claim in verdicts(alone)} == {None}
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert per_seed(alone, "fine_tuned", method="obd") == {0: 0.9}


def test_the_best_net_within_a_size_is_found():
    rows = made_up({"obd": 0.95, "magnitude": 0.9}, 0.92)
    rows += [row | {"sparsity": 0.5, "bytes": 2000, "fine_tuned": 0.99} for row in rows]
    best = best_within(rows, 1500)
    assert best["place"] == {"method": "obd", "granularity": "weight", "sparsity": 0.9}
    assert best["key"] == "fine_tuned" and best["bytes"] == 1000
    assert best_within(rows, 2000)["place"]["sparsity"] == 0.5
    assert best_within(rows, 999) is None


TINY = {
    "seeds": [1],
    "methods": ["random", "merging", STD],
    "sparsities": [0.9],
    "neuron_sparsities": [0.9],
    "bits": [2],
    "samples": 20,
    "epochs": 1,
    "fine_tune_epochs": 1,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[ComparisonOptions, StudyFolder]:
    data = dataclasses.replace(ComparisonOptions().data, limit=240, validation=100)
    options = ComparisonOptions(data=data, **TINY)
    return options, run_study(COMPARISON, options, tmp_path_factory.mktemp("study") / "comparison")


def rows_of(folder: StudyFolder) -> list[dict]:
    found = [entry["cell"] | entry["row"] for entry in folder.entries()]
    return sorted(found, key=lambda row: str(sorted(row.items())))


def test_rows_hold_what_the_protocol_says(tiny):
    rows = {(r["method"], r.get("granularity")): r for r in rows_of(tiny[1])}
    dense = rows["dense", None]
    assert dense["parameters"] == 266_610 and dense["bytes"] == 4 * 266_610
    assert rows["quantization", None]["bytes"] == 266_200 // 4 + 2 * 410 + 4 * 410
    for (_, granularity), row in rows.items():
        if granularity:
            assert len(row["mask"]) == 64
            assert all(0 <= row[key] <= 1 for key in ("cut", "fine_tuned", "scratch"))
            assert ("lottery" in row) == (granularity == "weight")
    assert rows["random", "weight"]["kept"] == 26_620
    assert rows["random", "weight"]["mask"] != rows[STD, "weight"]["mask"]
    units = [rows[name, "neuron"] for name in TINY["methods"]]
    assert all(row["units"] == [30, 10, 10] and row["total"] == 266_200 for row in units)
    assert len({row["scratch"] for row in units}) == 1  # equal widths: one training
    assert len({row["mask"] for row in units}) == 3


def test_a_repetition_and_a_resume_give_the_same_rows(tiny, tmp_path):
    options, folder = tiny
    out = tmp_path / "again"
    run_study(COMPARISON, options, out, only=lambda cell: cell["method"] == "merging")
    again = run_study(COMPARISON, options, out)
    assert rows_of(again) == rows_of(folder)


def test_the_page_has_claims_tables_and_plots(tiny):
    folder = tiny[1]
    page = (folder.path / "README.md").read_text()
    for words in ("## Claims", "| random", "| obd_sd-standard-deviation", "undecided", "At equal"):
        assert words in page
    for name in ("weight", "neuron", "bytes"):
        assert f"]({name}.png)" in page and (folder.path / f"{name}.png").stat().st_size > 5000


def test_a_page_of_some_cells_says_what_is_missing(tiny):
    options, folder = tiny
    rows = [row for row in rows_of(folder) if row["method"] in ("dense", "quantization")]
    page = COMPARISON.page(rows, options, folder)
    assert "No claim can be judged" in page and "none is as small" in page
