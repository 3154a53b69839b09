from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch

from liveweight import cli, studies
from liveweight.runs.recipe import DataRecipe, RecipeError, option
from liveweight.studies.grid import Study, StudyFolder, StudyOptions, export, run_study, slug
from liveweight.studies.page import Claim, claims, paired, spread


@dataclass(frozen=True)
class Options(StudyOptions):
    """A study of sums."""

    data: DataRecipe = field(default_factory=DataRecipe)
    size: int = option(4, "numbers that are summed")


def make_study(log: list, fail_at: int | None = None) -> Study:
    def cells(options):
        kinds = ("normal", "uniform")
        return [{"kind": kind, "seed": seed} for kind in kinds for seed in options.seeds]

    def run(cell, options, folder):
        if len(log) == fail_at:
            raise KeyboardInterrupt
        log.append(cell)

        def make():
            log.append("made")
            return {"x": torch.full((options.size,), float(cell["seed"]))}, {"n": options.size}

        tensors, facts = folder.cached(f"base-{cell['seed']}", make)
        return {"sum": float(tensors["x"].sum() + torch.rand(())), "n": facts["n"]}

    def page(rows, options, folder):
        return f"{len(rows)} rows: " + spread([row["sum"] for row in rows])

    return Study("sums", "Sums of numbers", Options, cells, run, page)


def test_a_study_writes_rows_and_page(tmp_path):
    log: list = []
    folder = run_study(make_study(log), Options(seeds=[0, 1]), tmp_path / "s")
    assert log.count("made") == 2, "what cells share is made once"
    rows = json.loads((folder.path / "rows.json").read_text())
    assert [row["cell"]["kind"] for row in rows] == ["normal"] * 2 + ["uniform"] * 2
    assert 4 < rows[1]["row"]["sum"] < 5 and rows[0]["row"]["n"] == 4
    text = (folder.path / "README.md").read_text()
    assert "# Sums of numbers" in text and "4 rows: " in text and "**" not in text
    assert "liveweight study sums --seeds 0 1 --out runs/sums" in text


def test_an_interrupted_study_goes_on_and_gives_the_same_rows(tmp_path):
    options = Options(seeds=[0, 1, 2])
    whole = run_study(make_study([]), options, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_study(make_study([], fail_at=4), options, tmp_path / "cut")
    log: list = []
    cut = run_study(make_study(log), options, tmp_path / "cut")
    assert 0 < sum(isinstance(entry, dict) for entry in log) < 6
    assert [e["row"] for e in cut.entries()] == [e["row"] for e in whole.entries()]


def test_parts_of_a_study_make_the_whole(tmp_path):
    options = Options(seeds=[0, 1, 2])
    whole = run_study(make_study([]), options, tmp_path / "whole")
    for part in ((0, 2), (1, 2)):
        parts = run_study(make_study([]), options, tmp_path / "parts", part=part)
        assert (parts.path / "README.md").is_file() == (part == (1, 2))
    assert [e["row"] for e in parts.entries()] == [e["row"] for e in whole.entries()]


def test_seeds_can_be_added_but_nothing_else_changed(tmp_path):
    run_study(make_study([]), Options(seeds=[0]), tmp_path / "s")
    log: list = []
    run_study(make_study(log), Options(seeds=[0, 5]), tmp_path / "s")
    assert [c["seed"] for c in log if c != "made"] == [5, 5]
    for wrong, word in ((Options(seeds=[5]), "seeds"), (Options(seeds=[0, 5], size=3), "size")):
        with pytest.raises(RecipeError, match=word):
            run_study(make_study([]), wrong, tmp_path / "s")
    for wrong in ([], [1, 1]):
        with pytest.raises(RecipeError, match="seeds"):
            run_study(make_study([]), Options(seeds=wrong), tmp_path / "t")
    with pytest.raises(RecipeError, match="part"):
        run_study(make_study([]), Options(), tmp_path / "t", part=(2, 2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RecipeError, match="not empty"):
        run_study(make_study([]), Options(), tmp_path / "other")


def test_an_exported_page_can_be_written_again_and_names_no_path(tmp_path):
    study = make_study([])
    options = Options(seeds=[0], data=DataRecipe(source="idx", path="/a/b/mnist"))
    folder = run_study(study, options, tmp_path / "s")
    copy = export(study, folder, tmp_path / "page")
    assert sorted(p.name for p in copy.path.iterdir()) == ["README.md", "rows.json", "study.yaml"]
    again = export(study, StudyFolder(copy.path), tmp_path / "again")
    for name in ("README.md", "rows.json", "study.yaml"):
        text = (copy.path / name).read_text()
        assert text == (again.path / name).read_text()
        assert "/a/b" not in text
    assert "mnist" in (copy.path / "README.md").read_text()


def test_cells_with_one_name_are_refused(tmp_path):
    study = make_study([])
    twice = Study("s", "t", Options, lambda o: [{"a": 1}, {"a": 1}], study.run, study.page)
    with pytest.raises(ValueError, match="one name: a-1"):
        run_study(twice, Options(), tmp_path / "s")
    assert slug({"b": "x y/z", "a": 0.5}) == "a-0.5_b-x-y-z"


def test_a_damaged_cache_is_named(tmp_path):
    folder = run_study(make_study([]), Options(seeds=[0]), tmp_path / "s")
    (folder.path / "cache" / "base-0.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="base-0.*damaged"):
        folder.cached("base-0", lambda: ({}, {}))


def test_the_command_line_runs_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(studies.STUDIES, "sums", make_study([]))
    out = str(tmp_path / "s")
    words = ["study", "sums", "--seeds", "3", "4", "--size", "2", "--out", out]
    assert cli.main(words) == 0
    assert cli.main([w if w != "3" else "[3,4]" for w in words if w != "4"]) == 0
    assert "4 of 4 cells are there already" in capsys.readouterr().out
    assert cli.main(["report", out, "--page", str(tmp_path / "page")]) == 0
    assert (tmp_path / "page" / "README.md").is_file()
    assert cli.main(["list", "studies"]) == 0
    assert "Sums of numbers" in capsys.readouterr().out
    assert cli.main(["study", "--help"]) == 0 and "sums" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study", "sum"], "no study 'sum': did you mean 'sums'"),
        (["study", "sums", "--siez", "3"], "--size"),
        (["study", "sums", "--size", "three"], "size"),
        (["study", "sums", "--part", "2"], "--part must be i/n"),
        (["study", "sums", "--only", "kind"], "--only takes KEY=VALUE"),
        (["study", "sums", "--only", "knid=normal"], "kind"),
    ],
)
def test_wrong_command_lines(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setitem(studies.STUDIES, "sums", make_study([]))
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_only_some_cells(tmp_path, monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "sums", make_study([]))
    out = str(tmp_path / "s")
    assert cli.main(["study", "sums", "--only", "kind=normal", "seed=1", "--out", out]) == 0
    assert [e["cell"] for e in StudyFolder(out).entries()] == [{"kind": "normal", "seed": 1}]


def test_spread_pairs_and_claims():
    assert spread([0.5, 0.7], scale=100) == "60.00 ± 14.14"
    assert spread([1.0]) == "1.00" and spread([]) == "-"
    mean, error, verdict = paired([1.0, 2.0, 3.0], [0.0, 1.1, 1.9])
    assert mean == pytest.approx(1.0) and error == pytest.approx(0.1 / 3**0.5)
    assert verdict is True
    assert paired([0.0, 1.1, 1.9], [1.0, 2.0, 3.0])[2] is False
    assert paired([1.0, 2.0], [2.0, 1.0])[2] is None and paired([1.0], [0.0])[2] is None
    with pytest.raises(ValueError, match="as many"):
        paired([1.0], [])
    text = claims([Claim("a is best", "b is", False), Claim("c", "so", None)])
    assert "**no**" in text and "undecided" in text
