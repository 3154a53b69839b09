from __future__ import annotations

import json

import pytest

from liveweight.runs import budget, prune_run
from liveweight.runs.budget import describe, fitted, parse_duration, scaled, time_epoch
from liveweight.runs.progress import Reporter
from liveweight.runs.prune_run import PruningRun
from liveweight.runs.recipe import RecipeError, TrainRecipe


@pytest.mark.parametrize(
    ("text", "seconds"), [("20min", 1200), ("90s", 90), ("1h30min", 5400), ("0.5h", 1800)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["20", "min", "20 minutes", "0s", "-5min", "", "5min later"])
def test_other_words_are_refused(text):
    with pytest.raises(RecipeError, match="budget must be a time"):
        parse_duration(text)


def test_epochs_and_milestones_shrink_together():
    short = scaled(TrainRecipe(epochs=150, milestones=[80, 120]), 0.1)
    assert (short.epochs, short.milestones) == (15, [8, 12])
    shorter = scaled(TrainRecipe(epochs=60, milestones=[20, 40]), 0.02)
    assert (shorter.epochs, shorter.milestones) == (1, [])


def test_the_epoch_of_a_rewind_moves_along(tiny):
    recipe = tiny(train={"epochs": 20}, prune={"rewind": 4})
    assert fitted(recipe, {"factor": 0.5}).prune.rewind == 2
    assert fitted(tiny(), {"factor": 0.5}).prune.rewind == "init"


@pytest.fixture
def slow(monkeypatch):
    """An epoch takes 100 seconds, says the trial, and only once."""
    trials = []
    monkeypatch.setattr(budget, "time_epoch", lambda run: trials.append(run) or 100.0)
    return trials


def test_a_run_is_shortened_once_and_says_so(tmp_path, tiny, slow, execute, quick):
    # 8 + 2 * 16 epochs of 100 s; nine tenths of 2000 s are 18 epochs
    long = tiny(
        train={"epochs": 8, "milestones": [4]},
        retrain={"epochs": 16, "milestones": [8]},
        budget="2000s",
    )

    def stop(iteration: int, epoch: int) -> None:
        if iteration == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_run.execute(long, tmp_path / "r", Reporter(quiet=True), stop)
    folder = execute(long, tmp_path / "r")
    assert len(slow) == 1, "a run that is taken up again keeps its factor"
    facts = folder.result()["budget"]
    assert facts == {"budget_s": 2000, "epoch_s": 100, "planned_s": 4000, "factor": 0.45}
    epochs = [row["iteration"] for row in folder.metrics() if row["event"] == "epoch"]
    assert [epochs.count(i) for i in range(3)] == [4, 7, 7]
    report = (folder.path / "report.md").read_text()
    assert "SHORTENED to a budget of 33.3 minutes: 4 of 8 epochs of training" in report
    assert "7 of 16 of every retraining" in report and "| 7 epochs, adam" in report


def test_a_recipe_that_fits_is_left_alone(tmp_path, tiny, slow):
    recipe = tiny(budget="1h")
    run = PruningRun(recipe, tmp_path / "r", Reporter(quiet=True))
    assert run.budget["factor"] == 1 and run.recipe == recipe
    assert "nothing was shortened" in describe(recipe, run.budget)
    assert fitted(recipe, None) == recipe
    assert json.loads((tmp_path / "r" / "budget.json").read_text()) == run.budget


def test_a_bad_budget_makes_no_folder(tmp_path, tiny):
    with pytest.raises(RecipeError, match="budget must be a time.*'soon'"):
        PruningRun(tiny(budget="soon"), tmp_path / "r", Reporter(quiet=True))
    assert not (tmp_path / "r").exists()


def test_the_trial_measures_this_net(tmp_path, tiny):
    run = PruningRun(tiny(), tmp_path / "r", Reporter(quiet=True))
    before = {n: p.clone() for n, p in run.build().named_parameters()}
    assert 0 < time_epoch(run) < 60
    after = dict(run.build().named_parameters())
    assert all(after[n].equal(p) for n, p in before.items()), "the run starts from its own weights"
