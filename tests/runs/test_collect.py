"""One page over several runs: reading, grouping, figures, verdicts, and what is refused."""

from __future__ import annotations

import copy
import json
import sys

import pytest

from liveweight import cli
from liveweight.runs import collect
from liveweight.runs.collect import FinishedRun, Group, compact, gather, group_name, write_page
from liveweight.runs.nnrelief_claims import paper_claims
from liveweight.runs.recipe import from_dict
from liveweight.runs.spread import above, both, spread

NAMES = ("name", "median_us", "speedup")


def fake_result(seed: int) -> dict:
    """A result with known figures: 10 (and 20) of 100 weights left, 0.5 and 1.5 points lost."""
    layers = [{"name": "a", "kept": 5, "total": 50}, {"name": "b", "kept": 5 * seed, "total": 50}]
    common = {"total": 100, "total_all": 120, "seconds": 60.0, "log_bytes": 9, "pruned": {"x": 1}}
    iterates = [
        common | {"iteration": 0, "kept": 100, "kept_all": 120, "rows": layers},
        common | {"iteration": 1, "kept": 10 * (seed + 1), "kept_all": 30, "rows": layers},
    ]
    for row, accuracy in zip(iterates, (0.98, 0.97), strict=True):
        row |= {"validation_accuracy": accuracy, "test_accuracy": accuracy - 0.01}
    speeds = [
        ("dense", 90.0 + seed, 1.0),
        ("dense, torch.compile", 60.0, 1.5),
        ("compressed", 30.0, 3.0 + seed),
    ]
    choices = {"layers": [{"name": "a", "chosen": "unstructured"}]}
    return {
        "machine": {"CPU": "a CPU", "threads": "1", "date": f"2026-01-0{seed + 1}T10:00"},
        "data": {"train": 10, "validation": 5, "test": 5},
        "input_shape": [1, 28, 28],
        "iterates": iterates,
        "chosen": 1,
        "reason": "fewest weights",
        "validation": {"pruned": 0.97, "compressed": 0.97},
        "test": {"dense": 0.97, "compressed": 0.965 - 0.01 * seed},
        "compress": {"shrink": None, "choices": choices, "chosen_at": 64},
        "latency": [{"batch": 64, "rows": [dict(zip(NAMES, r, strict=True)) for r in speeds]}],
        "files": {"dense.safetensors": 4000, "checkpoint.safetensors": 500},
        "notes": ["a note"],
    }


@pytest.fixture
def make_run(tiny, tmp_path):
    """Return a function: a finished run's folder of a seed, with sections of the recipe updated."""

    def make(name: str, seed: int, change=None, **sections):
        path = tmp_path / name
        path.mkdir()
        recipe = tiny(seed=seed, **sections)
        (path / "recipe.yaml").write_text(recipe.to_yaml())
        result = fake_result(seed)
        if change:
            change(result)
        (path / "result.json").write_text(json.dumps(result))
        return path

    return make


def test_the_page_says_each_seed_and_the_spread(make_run, tmp_path):
    pytest.importorskip("matplotlib")
    runs = [make_run(f"lenet300-tiny-{seed}", seed) for seed in (1, 0)]
    said: list[str] = []
    page = write_page(runs, tmp_path / "page", said.append)
    assert said == [f"page: {page}"]
    names = {path.name for path in (tmp_path / "page").iterdir()}
    plots = {"lenet300-tiny-accuracy.png", "lenet300-tiny-speed.png"}
    assert names == {"README.md", "results.json", "lenet300-tiny.yaml"} | plots
    lines = page.read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    assert ["0", "1", "10", "10.0x", "4.00x"] in [row[:5] for row in cells]
    assert ["1", "1", "20", "5.00x", "4.00x"] in [row[:5] for row in cells]
    whole = next(row for row in cells if row[0] == "**all**" and len(row) > 9)
    assert whole[2:4] == ["15 ± 7", "7.50 ± 3.54x"]
    assert whole[9] == "-1.00 ± 0.71"  # -0.5 and -1.5: compressed minus dense of each seed
    assert ["64", "**all**", "90.5 ± 0.7", "60.0 ± 0.0", "30.0 ± 0.0"] in [r[:5] for r in cells]
    ours = next(row for row in cells if row[:2] == ["64", "**all**"])
    assert ours[5:] == ["3.50 ± 0.71x", "2.33 ± 0.47x"]
    assert ["b", "2 ± 4", "50", "5.00 ± 7.07 %", "dense"] in cells
    assert ["a", "5", "50", "10.00 ± 0.00 %", "unstructured"] in cells
    assert ["date", "2026-01-01, 2026-01-02"] in cells
    assert "- a note" in lines and lines.count("- a note") == 1


def test_a_page_is_made_again_and_grows_without_the_runs(make_run, tmp_path):
    runs = [make_run(f"r-{seed}", seed, data={"path": "/home/me/digits"}) for seed in (0, 1, 2)]
    whole = write_page(runs, tmp_path / "whole").read_text()
    out = tmp_path / "page"
    before = write_page(runs[:2], out).read_text()
    for name in ("README.md", "lenet300.yaml"):
        (out / name).unlink(missing_ok=True)
    assert cli.main(["report", str(out)]) == 0
    assert (out / "README.md").read_text() == before
    assert cli.main(["report", str(out), str(runs[2]), "--page", str(out)]) == 0
    assert (out / "README.md").read_text() == whole
    for file in out.glob("*.[jy]*"):
        assert "/home" not in file.read_text()
    first = json.loads((out / "results.json").read_text())["runs"][0]["result"]
    assert "pruned" not in first["iterates"][1] and "rows" not in first["iterates"][0]


def test_recipes_make_groups_and_settings_are_told_apart(make_run, tmp_path):
    a, b = make_run("mine-0", 0), make_run("mine-1", 1)
    c = make_run("mine-s2", 2, train={"epochs": 3})
    groups = gather([b, c, a])
    assert [(g.name, g.seeds) for g in groups] == [("mine", [0, 1]), ("mine~2", [2])]
    d = make_run("elsewhere-7", 7, report={"plots": True}, data={"path": "other/place"})
    assert gather([a, d])[0].seeds == [0, 7]  # plots and the place of the data change nothing


@pytest.mark.parametrize(
    ("folders", "name"),
    [
        (["vgg-cifar10-0", "vgg-cifar10-10"], "vgg-cifar10"),
        (["lenet300"], "lenet300"),
        (["runs.seed0", "runs.seed10"], "runs"),
        (["a", "b"], "lenet300"),
        (["resnet20-cifar10"], "resnet20-cifar10"),
    ],
)
def test_groups_are_named_after_their_folders(tiny, folders, name):
    runs = [FinishedRun(folder, tiny(seed=10 * i), {}) for i, folder in enumerate(folders)]
    assert group_name(runs) == name


def test_a_recipe_that_ships_has_its_name_and_changes_are_listed(make_run, tmp_path):
    built_in = collect.built_in("lenet5-mnist")
    assert group_name([FinishedRun("x", built_in, {})]) == "lenet5-mnist"
    run = make_run("lenet5-mnist-short-0", 0)
    values = built_in.to_dict()
    values["train"]["epochs"] = 5
    (run / "recipe.yaml").write_text(from_dict(values).to_yaml())
    text = write_page([run], tmp_path / "page").read_text()
    assert "`lenet5-mnist` with these keys changed: `train.epochs: 60 -> 5`" in text


def test_a_shortened_run_says_so(make_run, tmp_path):
    def shorten(factor):
        facts = {"budget_s": 60.0, "epoch_s": 1.0, "planned_s": 600.0, "factor": factor}
        return lambda result: result.update(budget=facts)

    asked = {"train": {"epochs": 20, "milestones": [10]}, "budget": "1min"}
    runs = [make_run(f"r-{i}", i, shorten(0.1), **asked) for i in (0, 1)]
    text = write_page(runs, tmp_path / "same").read_text()
    assert text.count("SHORTENED to a budget of 1 minutes: 2 of 20 epochs") == 1
    assert "| training            | 2 epochs" in text
    runs.append(make_run("r-2", 2, shorten(0.2), **asked))
    text = write_page(runs, tmp_path / "other").read_text()
    assert "- seed 1: SHORTENED" in text and "- seed 2: SHORTENED" in text and "4 of 20" in text


def test_without_matplotlib_the_page_has_no_plots(make_run, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    said: list[str] = []
    text = write_page([make_run("r-0", 0)], tmp_path / "page", said.append).read_text()
    assert "matplotlib is not installed" in said[0] and "![" not in text


def test_what_makes_no_page_is_named_and_writes_nothing(make_run, tmp_path, capsys):
    a, b = make_run("a-0", 0), make_run("b-0", 0)
    out = tmp_path / "page"
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my own")
    damaged, half = make_run("damaged-0", 0), make_run("half-0", 0)
    (damaged / "result.json").write_text("{")
    (half / "result.json").unlink()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "results.json").write_text('{"version": 99}')
    for words, message in (
        ([a, b, "--page", out], "a-0 and b-0 are runs of one recipe with the same seed (0)"),
        ([half, "--page", out], "the run is not finished"),
        ([damaged, "--page", out], "result.json: damaged"),
        ([tmp_path / "empty", "--page", out], "not a run folder"),
        ([tmp_path / "odd", "--page", out], "not the runs of a page (version 99, expected 1)"),
        ([a, "--page", tmp_path / "mine"], "is not a page of runs; choose another --page"),
    ):
        assert cli.main(["report", *map(str, words)]) == 1
        assert message in capsys.readouterr().err
        assert not out.exists()
    assert (tmp_path / "mine" / "README.md").read_text() == "my own"
    assert cli.main(["report", str(a), str(b)]) == 2
    assert "say where with --page DIR" in capsys.readouterr().err


def test_without_torch_compile_its_columns_stay_empty(make_run, tmp_path):
    def drop(result):
        del result["latency"][0]["rows"][1]

    text = write_page([make_run("r-0", 0, drop)], tmp_path / "page").read_text()
    row = next(line for line in text.splitlines() if line.startswith("|    64 |"))
    assert [c.strip() for c in row.split("|")][3:8] == ["90.0", "-", "30.0", "3.00x", "-"]


def a_group(tiny, name: str, model: str, losses, fewer, importance="nnrelief") -> Group:
    runs = []
    for seed, (loss, ratio) in enumerate(zip(losses, fewer, strict=True)):
        result = copy.deepcopy(compact(fake_result(0)))
        result["test"] = {"dense": 0.9, "compressed": 0.9 + loss / 100}
        result["iterates"][1]["kept"], result["iterates"][1]["total"] = 1000, round(1000 * ratio)
        recipe = tiny(model={"name": model}, prune={"importance": importance}, seed=seed)
        runs.append(FinishedRun(f"{name}-{seed}", recipe, result))
    return Group(name, runs)


@pytest.mark.parametrize(
    ("model", "name", "losses", "fewer", "holds"),
    [
        ("lenet5", "lenet5-mnist", (-0.1, -0.2, 0.0), (60, 61, 62), True),
        ("lenet5", "lenet5-mnist", (-0.7, -0.8, -0.9), (60, 61, 62), False),
        ("lenet5", "lenet5-mnist", (0.0, -0.5, -1.0), (60, 61, 62), None),
        ("vgg-like", "vgg-like-cifar10", (0.1, 0.2), (51, 52), True),
        ("vgg-like", "vgg-like-cifar10", (0.1, 0.0), (48, 49), False),
        ("vgg-like", "vgg-like-cifar10", (-3.0, -3.1), (90, 91), False),
        ("vgg-like", "vgg-like-cifar10", (0.1,), (90,), None),
        ("vgg-like", "vgg-like-cifar10", (0.1, 0.1), (40, 70), None),
        ("resnet20", "resnet20-cifar10", (0.1,), (9,), None),
        ("vgg13", "vgg13-cifar100", (0.1,), (90,), None),
    ],
)
def test_verdicts_rest_on_paired_differences_and_their_spread(
    tiny, model, name, losses, fewer, holds
):
    (claim,) = paper_claims(a_group(tiny, name, model, losses, fewer))
    assert claim.holds is holds
    assert f"{len(losses)} seed" in claim.seen


def test_no_claim_is_made_where_the_paper_says_nothing(tiny):
    for name, model, importance in (
        ("lenet5-digits", "lenet5", "nnrelief"),
        ("lenet5-mnist", "lenet5", "magnitude"),
        ("vit4-mnist", "vit4", "nnrelief"),
    ):
        assert paper_claims(a_group(tiny, name, model, (0.0,), (9,), importance)) == []


def test_spread_and_verdicts():
    assert (spread([]), spread([1234.5], 1), spread([1, 3], 0)) == ("-", "1,234.5", "2 ± 1")
    assert spread([0.970, 0.972], 1, 100) == "97.1 ± 0.1"
    assert (above([2, 2.1], 1), above([0, 0.1], 1), above([0, 2], 1)) == (True, False, None)
    assert above([9.0], 1.0) is None  # one seed has no spread
    assert (both(True, True), both(None, False), both(True, None)) == (True, False, None)
