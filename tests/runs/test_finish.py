from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from liveweight.runs import report
from liveweight.runs.data import Split
from liveweight.runs.finish import choose_iterate, settle_
from liveweight.runs.folder import RunFolder, differing_keys, write_atomic
from liveweight.runs.recipe import PruneRecipe, Recipe
from liveweight.runs.train import evaluate


def rows(*accuracies: float, kept=(100, 50, 20, 10)) -> list[dict]:
    return [{"validation_accuracy": a, "kept": k} for a, k in zip(accuracies, kept, strict=False)]


@pytest.mark.parametrize(
    ("keep", "accuracies", "expected"),
    [
        ("smallest", (0.98, 0.985, 0.975, 0.96), 2),
        ("smallest", (0.98, 0.985, 0.975, 0.97), 3),  # exactly at the tolerance of one point
        ("smallest", (0.98, 0.90, 0.95, 0.94), 2),  # none inside: loses least
        ("best", (0.99, 0.97, 0.98, 0.98), 3),  # a tie goes to fewer weights
        ("last", (0.99, 0.97, 0.98, 0.10), 3),
        ("smallest", (0.99,), 0),
    ],
)
def test_choice_of_the_iterate(keep, accuracies, expected):
    recipe = PruneRecipe(keep=keep, tolerance=1.0)
    index, reason = choose_iterate(recipe, rows(*accuracies))
    assert index == expected
    assert reason


@pytest.mark.parametrize("drift", [0.0, 5.0])
def test_batch_norm_is_recalibrated_only_where_validation_gains(drift):
    """Training data that drifted from validation's gives statistics that serve it worse."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (400,), generator=generator)
    x = torch.randn(400, 1, 2, 2, generator=generator) * 0.1 + labels.view(-1, 1, 1, 1)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 4))
        model[2].bias.zero_()
        model[0].running_mean.fill_(0.5 if drift else 9.0)  # right for validation, or far off
    stored = model[0].running_mean.clone()
    data = SimpleNamespace(train=Split(x + drift, labels), validation=Split(x, labels))
    (note,) = settle_(SimpleNamespace(data=data), model)
    accuracy, _ = evaluate(model, data.validation)
    assert accuracy == 1.0
    assert model[0].running_mean.equal(stored) == bool(drift)
    assert ("recalibrated:" in note) == (not drift)
    assert "validation" in note and "100.00 %" in note


def fake_result() -> dict:
    layers = [{"name": "fc", "kept": 10, "total": 100}]
    iterate = {"total": 100, "total_all": 120, "epoch": 1, "seconds": 2.0, "rows": layers}
    both = [
        {**iterate, "iteration": i, "kept": k, "kept_all": k + 20, "validation_accuracy": a}
        for i, k, a in ((0, 100, 0.98), (1, 10, 0.97))
    ]
    speeds = [("dense", 90.0, 1.0), ("dense, torch.compile", 60.0, 1.5), ("compressed", 30.0, 3.0)]
    names = ("name", "median_us", "speedup")
    return {
        "machine": {"CPU": "a CPU", "threads": "2", "device": "cpu", "date": "2026-01-01"},
        "data": {"train": 10, "validation": 5, "test": 5},
        "iterates": both,
        "chosen": 1,
        "reason": "fewest weights",
        "validation": {"pruned": 0.97, "compressed": 0.97},
        "test": {"dense": 0.98, "compressed": 0.965},
        "compress": {"shrink": None, "choices": None, "chosen_at": None},
        "latency": [{"batch": 64, "rows": [dict(zip(names, row, strict=True)) for row in speeds]}],
        "files": {"dense.safetensors": 4000, "checkpoint.safetensors": 500},
        "notes": ["a note"],
    }


def test_summary_and_report_say_the_figures():
    text = report.summary(fake_result())
    assert "10 of 100 (10.0x fewer)" in text
    assert "96.50 %, dense 98.00 %" in text
    assert "30 us, 3.00x dense (90 us), 2.00x torch.compile'd dense (60 us)" in text
    assert "(8.00x smaller)" in text
    page = report.render(Recipe(), fake_result(), ["latency.png"])
    assert "| 1 (kept)" in page and "a note" in page
    assert "plots/latency.png" in page and "plots/density.png" not in page


def test_without_matplotlib_the_report_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [n for n in sys.modules if n.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    said: list[str] = []
    report.write_report(RunFolder(tmp_path), Recipe(), fake_result(), said.append)
    assert sum("matplotlib is not installed" in line for line in said) == 1
    assert "![" not in (tmp_path / "report.md").read_text()


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from liveweight.runs import plots

    names = plots.draw(fake_result(), tmp_path / "plots")
    assert sorted(names) == ["accuracy.png", "density.png", "latency.png"]
    for name in names:
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_tables_escape_bars_and_align_figures():
    text = report.table(["name", "n"], [("a|b", "1"), ("c", "10")])
    assert text.splitlines() == [
        "| name | n  |".replace("n  |", " n |"),
        "|------|---:|",
        "| a\\|b |  1 |",
        "| c    | 10 |",
    ]


def test_sentences_that_begin_with_a_figure_are_no_figures():
    text = report.table(["a", "b"], [("+1.5 ± 0.2", "3 points more"), ("-", "12 less")])
    assert text.splitlines()[1:3] == [
        "|-----------:|---------------|",
        "| +1.5 ± 0.2 | 3 points more |",
    ]


def test_differing_keys_are_named_with_both_values():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}
    assert differing_keys(old, new) == ["a.c: 2 -> 5", "d: 3 -> None", "e: None -> 4"]


def test_write_atomic_leaves_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_damaged_files_of_a_run_are_named(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "state.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"state\.pt: damaged; remove it to repeat the phase"):
        folder.load_state()
    (tmp_path / "init.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"init\.safetensors: missing or damaged"):
        folder.load_tensors("init")
    with pytest.raises(ValueError, match="not a run folder"):
        folder.result()
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    with pytest.raises(ValueError, match="not finished; resume it with: liveweight prune"):
        folder.result()
