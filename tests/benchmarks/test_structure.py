"""The comparison of masks with structure, on a few of the packaged digits."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pathlib

import pytest
import torch

from liveweight.runs.recipe import DataRecipe

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("structure")


@pytest.fixture
def structure(module, monkeypatch):
    tiny = module.Case(
        "LeNet-5, digits", "lenet5", DataRecipe(limit=60), 1, 20, ("features.0", "classifier.3"),
        ("magnitude",), module.LENET_BLOCKS[:1], (0,), batch_size=20,
    )  # fmt: skip
    monkeypatch.setattr(module, "cases", lambda args: [tiny])
    monkeypatch.setattr(module, "GROUPS", {0.5: 4, 0.75: 8})
    return module


def test_rows_page_and_plot(structure, tmp_path):
    threads = torch.get_num_threads()
    structure.main(["--quick", "--out", str(tmp_path)])
    assert torch.get_num_threads() == threads
    facts = json.loads((tmp_path / "lenet-5-digits.json").read_text())
    assert facts["settings"]["train"] == 60 and "path" not in facts["settings"]["data"]
    rows = {(r["structure"], r["clustered"], r["sparsity"]): r for r in facts["rows"]}
    assert set(rows) == {
        ("dense", False, 0.0),
        *(("single weights", False, s) for s in (0.5, 0.75)),
        *(("blocks 16x16", c, s) for c in (False, True) for s in (0.5, 0.75)),
        ("V:N:M, V = 16", False, 0.5),  # M = 8 does not divide 20 channels
    }
    for (name, _, sparsity), row in rows.items():
        assert 0 <= row["before"] <= 1 and 0 <= row["after"] <= 1
        assert row["density"] == pytest.approx(1 - sparsity, abs=0.02)
        assert row["mass"] <= row["best_mass"] + 1e-9
        if name in ("dense", "single weights"):
            assert row["mass"] == row["best_mass"]
    for sparsity in (0.5, 0.75):
        plain, clustered = (rows["blocks 16x16", c, sparsity]["mass"] for c in (False, True))
        assert clustered > plain
    page = (tmp_path / "README.md").read_text()
    assert "| V:N:M, V = 16 | " in page and " | - |" in page and "1 seed; 60 training" in page
    assert (tmp_path / "structure.png").read_bytes()[:4] == b"\x89PNG"
    structure.main(["--page-only", "--out", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == page


def test_all_cases_leave_the_first_and_the_last_layer(module):
    given = {"quick": False, "mnist": "m", "cifar": "c", "mnist_seeds": 3, "cifar_seeds": 1}
    cases = module.cases(argparse.Namespace(**given))
    assert [c.name for c in cases] == ["LeNet-5, MNIST", "VGG-like, CIFAR-10"]
    assert [c.seeds for c in cases] == [(0, 1, 2), (0,)]
    for case in cases:
        layers = [n for n, m in case.build().named_modules() if hasattr(m, "in_features")
                  or hasattr(m, "in_channels")]  # fmt: skip
        assert case.ignore == (layers[0], layers[-1]) and len(layers) > 3


def test_the_net_for_cifar_fits_every_pattern(module):
    net = module.vgg()
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    pruned = [m for m in net if hasattr(m, "weight") and m.weight.dim() > 1][1:-1]
    assert all(m.weight.shape[1] % 40 == 0 for m in pruned) and len(pruned) == 4


def test_wrong_calls(structure, tmp_path):
    with pytest.raises(SystemExit):
        structure.main(["--out", str(tmp_path)])
    with pytest.raises(ValueError, match="no results"):
        structure.main(["--page-only", "--out", str(tmp_path)])


def test_masks_are_cut_from_the_same_net(structure):
    case = structure.cases(None)[0]
    data = structure.load_data(case.data)
    dense = structure.train(case, data, 0)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    for mask in structure.masks(case):
        structure.measure(
            dataclasses.replace(case, tune_samples=10), data, dense, 0, "nnrelief", mask
        )
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
