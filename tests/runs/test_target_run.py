"""Recipes with a target: liveweight prune ... --prune.target_latency 50%."""

from __future__ import annotations

import pytest

from liveweight.runs import finish
from liveweight.runs.finish import choose_iterate
from liveweight.runs.parse import parse_recipe
from liveweight.runs.recipe import PruneRecipe, RecipeError
from liveweight.runs.target import prune_to as target
from liveweight.runs.target.cost import Given

BY_SIZE = {"alpha": None, "importance": "magnitude"}


@pytest.fixture
def no_finish(monkeypatch):
    monkeypatch.setattr(finish, "finish", lambda run: None)


def iterates(folder):
    return [folder.load_tensors(f"iterates/{i:02d}")[1] for i in range(folder.iterates_done())]


def test_parameters_go_in_equal_factors_under_fixed_masks(tiny, execute, tmp_path, no_finish):
    recipe = tiny(prune=BY_SIZE | {"target_parameters": "25%"})
    rows = iterates(execute(recipe, tmp_path / "run"))
    assert rows[0]["kept"] == 266_610
    targets = [row["pruned"]["target"] for row in rows[1:]]
    assert [t["target"] / t["dense"] for t in targets] == pytest.approx([0.5, 0.25])
    for row, found in zip(rows[1:], targets, strict=True):
        assert found["reached"] and found["cost"] <= found["target"]
        # shrinking takes away what is left of units that died, so more is masked than is saved
        assert found["cost"] <= row["kept_all"] <= 1.05 * found["target"]
        assert row["pruned"]["layers"][0]["kept"] > 0
    again = iterates(execute(recipe, tmp_path / "again"))
    for row in (*rows, *again):
        row.pop("seconds"), row.pop("log_bytes")
    assert again == rows


def test_a_target_out_of_reach_stops_with_what_was_reached(tiny, execute, tmp_path, no_finish):
    prune = BY_SIZE | {"target_parameters": 200, "iterations": 2}
    rows = iterates(execute(tiny(prune=prune), tmp_path / "run"))
    first, second = (row["pruned"]["target"] for row in rows[1:])
    assert first["reached"] and not second["reached"]
    assert rows[2]["kept"] == rows[1]["kept"] < rows[0]["kept"] / 10
    assert "not reached, the model is as it was" in second["summary"]


def test_importances_that_need_labels_get_them(tiny, execute, tmp_path, no_finish):
    prune = {"alpha": None, "sparsity": 0.5, "importance": "snip", "iterations": 1}
    rows = iterates(execute(tiny(prune=prune), tmp_path / "run"))
    assert rows[1]["kept"] / rows[1]["total"] == pytest.approx(0.5, abs=0.01)


def test_latency_is_asked_for_at_the_first_batch_size_and_reported(
    tiny, execute, tmp_path, quick, monkeypatch
):
    def seconds(model):
        return 1e-9 * sum(int(p.count_nonzero()) for p in model.parameters())

    def latency(model, inputs, relative, compile_dense):
        assert (len(inputs.args[0]), relative, compile_dense) == (4, True, False)
        return Given(model, seconds)

    monkeypatch.setattr(target, "Latency", latency)
    folder = execute(tiny(prune={"target_latency": "40%"}), tmp_path / "run")
    result = folder.result()
    assert result["chosen"] == 2 and result["reason"] == "the recipe prunes to a target"
    assert result["iterates"][2]["kept"] <= 0.42 * result["iterates"][0]["kept"]
    report = (folder.path / "report.md").read_text()
    assert "nnrelief, to 40% of the dense latency, 2 times" in report
    assert "- Target: 40% of the dense latency" in report


def test_the_command_line_takes_a_target_in_place_of_alpha():
    recipe = parse_recipe("lenet5-digits", ["--prune.target_latency", "50%"])
    assert recipe.prune.target_latency == "50%" and recipe.prune.alpha is not None
    assert str(recipe.prune.goal) == "50% of the dense latency"
    recipe = parse_recipe("lenet5-digits", ["--prune.target_flops", "200000"])
    assert recipe.prune.goal.cost(1e6) == 200_000


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"target_latency": "fast"}, 'prune: target_latency must be a share.*"50%"'),
        ({"target_flops": 0.5}, "prune: target_flops must be FLOPs, 1 or more"),
        ({"target_flops": 5, "target_latency": 1.0}, "prune: give one of"),
        ({"target_flops": 5, "pattern": [1, 2, 4]}, "prune.pattern must be empty with a target"),
    ],
)
def test_unusable_targets_are_named_before_any_work(tiny, prune, message):
    with pytest.raises(RecipeError, match=message):
        tiny(prune=prune)


def test_a_target_keeps_the_last_iteration():
    rows = [{"validation_accuracy": a, "kept": k} for a, k in ((0.99, 9), (0.98, 5), (0.5, 2))]
    index, reason = choose_iterate(PruneRecipe(target_flops="50%", keep="best"), rows)
    assert (index, reason) == (2, "the recipe prunes to a target")
