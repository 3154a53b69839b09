from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from liveweight import compress, prune
from liveweight.runs import finish, phase, prune_run
from liveweight.runs.data import Split
from liveweight.runs.progress import Reporter
from liveweight.runs.prune_run import PruningRun, step_sparsity
from liveweight.runs.recipe import RecipeError
from liveweight.runs.train import evaluate


class Interruption(Exception):
    pass


@pytest.fixture
def no_finish(monkeypatch):
    """Leave out what follows the last phase."""
    monkeypatch.setattr(finish, "finish", lambda run: None)


def interrupt_after(count: int):
    calls = []

    def on_epoch(iteration: int, epoch: int) -> None:
        calls.append((iteration, epoch))
        if len(calls) == count:
            raise Interruption

    return on_epoch


def everything(folder):
    """Return iterates with their facts, and metrics, without times."""
    iterates = [folder.load_tensors(f"iterates/{i:02d}") for i in range(folder.iterates_done())]
    for _, facts in iterates:
        facts.pop("seconds"), facts.pop("log_bytes")
    lines = [{k: v for k, v in row.items() if k != "seconds"} for row in folder.metrics()]
    return iterates, lines


def assert_same(first, second):
    (first_iterates, first_lines), (second_iterates, second_lines) = first, second
    assert first_lines == second_lines
    assert len(first_iterates) == len(second_iterates)
    for (a, a_facts), (b, b_facts) in zip(first_iterates, second_iterates, strict=True):
        assert a_facts == b_facts
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def reference_run(tiny, execute, tmp_path_factory):
    """Iterates and metrics of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "finish", lambda run: None)
        return everything(execute(tiny(), tmp_path_factory.mktemp("whole") / "run"))


MOVED = {"augment": ["crop", "flip"], "precision": "bf16"}


# after epoch 1 of dense, its last epoch, and the first and last epoch of iteration 1
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny, execute, tmp_path, no_finish, reference_run, stop
):
    with pytest.raises(Interruption):
        execute(tiny(), tmp_path / "cut", on_epoch=interrupt_after(stop))
    done = []
    folder = execute(tiny(), tmp_path / "cut", on_epoch=lambda i, e: done.append((i, e)))
    assert len(done) == 6 - stop  # no epoch whose state was on disk is repeated
    assert_same(everything(folder), reference_run)


def test_an_epoch_that_was_cut_short_is_repeated(
    tiny, execute, tmp_path, no_finish, reference_run, monkeypatch
):
    real, calls = phase.train_epoch, []

    def die_in_the_fourth(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            args[0].classifier[1].weight.data.zero_()
            raise Interruption
        return real(*args, **options)

    monkeypatch.setattr(phase, "train_epoch", die_in_the_fourth)
    with pytest.raises(Interruption):
        execute(tiny(), tmp_path / "cut")
    monkeypatch.setattr(phase, "train_epoch", real)
    assert_same(everything(execute(tiny(), tmp_path / "cut")), reference_run)


def test_a_convolutional_run_resumes_too(tiny, execute, tmp_path, no_finish):
    recipe = tiny(model={"name": "lenet5"}, data={"limit": 40}, prune={"iterations": 1})
    whole = everything(execute(recipe, tmp_path / "whole"))
    with pytest.raises(Interruption):
        execute(recipe, tmp_path / "cut", on_epoch=interrupt_after(3))
    assert_same(everything(execute(recipe, tmp_path / "cut")), whole)


def test_an_augmented_run_resumes_too(tiny, execute, tmp_path, no_finish):
    recipe = tiny(
        model={"name": "lenet5"},
        data={"limit": 40},
        train=MOVED,
        retrain=MOVED,
        prune={"iterations": 1},
    )
    whole = everything(execute(recipe, tmp_path / "whole"))
    with pytest.raises(Interruption):
        execute(recipe, tmp_path / "cut", on_epoch=interrupt_after(3))
    assert_same(everything(execute(recipe, tmp_path / "cut")), whole)
    plain = tiny(model={"name": "lenet5"}, data={"limit": 40}, prune={"iterations": 0})
    other = everything(execute(plain, tmp_path / "plain"))
    key = "features.0.weight"
    assert not torch.equal(whole[0][0][0][key], other[0][0][0][key])


def test_masks_hold_and_grow_from_iteration_to_iteration(reference_run):
    (_, dense), (first, one), (second, two) = reference_run[0]
    assert dense["kept"] == dense["total"] == 266_610
    assert two["kept"] < one["kept"] < dense["kept"]
    key = "classifier.1.weight"
    assert first[key][~first[f"{key}_mask"]].eq(0).all()
    assert not (second[f"{key}_mask"] & ~first[f"{key}_mask"]).any()


def test_rewind_starts_retraining_from_the_first_weights(tiny, tmp_path):
    run = PruningRun(tiny(), tmp_path / "run", Reporter(quiet=True))
    run.run_phase(0)
    model, _ = run.load(0)
    run.prune(model, 1)
    first, key = run.build().state_dict(), "classifier.3.weight"
    mask = prune.masks(model)[key]
    assert torch.equal(model.state_dict()[key], first[key] * mask)


def test_rewind_to_an_early_epoch(tiny, tmp_path):
    recipe = tiny(prune={"rewind": 1}, train={"epochs": 2})
    kept = []

    def stop(iteration: int, epoch: int) -> None:
        if not kept:
            kept.append(run.folder.load_tensors("rewind")[0])

    run = PruningRun(recipe, tmp_path / "run", Reporter(quiet=True), stop)
    run.run_phase(0)
    late = run.folder.load_tensors("iterates/00")[0]
    assert any(not late[name].equal(value) for name, value in kept[0].items()), "trained on"
    model, _ = run.load(0)
    run.prune(model, 1)
    for name, mask in prune.masks(model).items():
        expected = torch.where(mask, kept[0][name], torch.zeros(()))
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=0, atol=0)


def test_without_rewind_weights_continue(tiny, tmp_path):
    run = PruningRun(tiny(prune={"rewind": "none"}), tmp_path / "run", Reporter(quiet=True))
    run.run_phase(0)
    model, _ = run.load(0)
    before, key = model.state_dict()["classifier.3.weight"].clone(), "classifier.3.weight"
    run.prune(model, 1)
    assert torch.equal(model.state_dict()[key], before * prune.masks(model)[key])


def test_sparsity_is_reached_in_equal_steps(tiny, execute, tmp_path, no_finish):
    assert step_sparsity(0.75, 1, 2) == pytest.approx(0.5)
    goal = {"alpha": None, "sparsity": 0.75, "importance": "magnitude"}
    folder = execute(tiny(prune=goal), tmp_path / "run")
    facts = [folder.load_tensors(f"iterates/{i:02d}")[1] for i in range(3)]
    assert [f["kept"] / f["total"] for f in facts] == pytest.approx([1, 0.5, 0.25], abs=0.01)


@pytest.mark.parametrize(
    ("prune", "kept"),
    [
        ({"granularity": "block", "block": [10, 14], "alpha": None, "sparsity": 0.75}, 0.25),
        ({"granularity": "vnm", "pattern": [10, 2, 4], "alpha": None}, 0.5),
    ],
)
def test_structured_runs(tiny, execute, tmp_path, no_finish, prune, kept):
    recipe = tiny(prune=prune | {"iterations": 1, "importance": "magnitude", "ignore": ["*.5"]})
    folder = execute(recipe, tmp_path / "run")
    rows = folder.load_tensors("iterates/01")[1]["pruned"]["layers"]
    assert rows[0]["kept"] == round(kept * rows[0]["total"])
    assert rows[0]["kept_mass"] <= rows[0]["best_mass"] < 1


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"granularity": "blok"}, "did you mean 'block'"),
        ({"granularity": "block"}, r"needs block=\(height, width\)"),
        ({"block": [4, 4]}, "goes with granularity='block'"),
    ],
)
def test_structures_are_checked_before_any_work(tiny, execute, tmp_path, prune, message):
    with pytest.raises(RecipeError, match=message):
        execute(tiny(prune=prune), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_holds_everything(tiny, execute, tmp_path, quick):
    pytest.importorskip("matplotlib")
    folder = execute(tiny(report={"plots": True}), tmp_path / "run")
    names = {p.relative_to(folder.path).as_posix() for p in folder.path.rglob("*") if p.is_file()}
    assert names == {
        "recipe.yaml",
        "metrics.jsonl",
        "init.safetensors",
        "iterates/00.safetensors",
        "iterates/01.safetensors",
        "iterates/02.safetensors",
        "dense.safetensors",
        "checkpoint.safetensors",
        "result.json",
        "report.md",
        "plots/accuracy.png",
        "plots/density.png",
        "plots/latency.png",
    }
    report = (folder.path / "report.md").read_text()
    for text in ("## Iterations", "## Layers", "## Latency", "classifier.1", "![", "threads"):
        assert text in report
    result = json.loads((folder.path / "result.json").read_text())
    assert result["chosen"] == 2  # the smallest: the tolerance allows everything
    assert {"date", "torch", "CPU", "threads"} <= result["machine"].keys()
    assert [r["name"] for r in result["latency"][0]["rows"]][::2] == ["dense", "compressed"][:2]
    epochs = [row for row in folder.metrics() if row["event"] == "epoch"]
    assert len(epochs) == 6


def test_the_checkpoint_is_the_kept_model(tiny, execute, tmp_path, quick):
    folder = execute(tiny(), tmp_path / "run")
    run = PruningRun(tiny(), tmp_path / "other", Reporter(quiet=True))
    model = compress.load(folder.path / "checkpoint.safetensors", run.build())
    run.folder = folder
    kept, _ = run.load(folder.result()["chosen"])
    x = run.data.test.inputs[:8]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), kept.eval()(x), rtol=1e-4, atol=1e-4)
    assert evaluate(model, run.data.test)[0] == folder.result()["test"]["compressed"]


def test_a_run_interrupted_while_finishing_goes_on(tiny, execute, tmp_path, quick, monkeypatch):
    real = compress.save

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(compress, "save", fail)
    with pytest.raises(OSError, match="no space"):
        execute(tiny(), tmp_path / "run")
    monkeypatch.setattr(compress, "save", real)
    folder = execute(tiny(), tmp_path / "run")
    assert [row["event"] for row in folder.metrics()].count("finish") == 1


def test_the_test_set_decides_nothing(tiny, execute, tmp_path, quick, monkeypatch):
    folder = execute(tiny(), tmp_path / "a")
    real = prune_run.load_data

    def with_garbage(*args):
        data = real(*args)
        noise = torch.randn_like(data.test.inputs)
        return dataclasses.replace(data, test=Split(noise, data.test.labels.flip(0)))

    monkeypatch.setattr(prune_run, "load_data", with_garbage)
    other = execute(tiny(), tmp_path / "b")
    first, second = everything(folder), everything(other)
    first[1].pop(), second[1].pop()  # the line that reports test accuracies
    assert_same(first, second)
    assert folder.result()["chosen"] == other.result()["chosen"]
    assert folder.result()["test"] != other.result()["test"]


def test_bad_models_data_and_criteria_leave_no_folder(tiny, execute, tmp_path):
    out = tmp_path / "run"
    for change, message in (
        ({"model": {"name": "lenet5", "arguments": {"channels": 3}}}, "does not take inputs"),
        ({"model": {"name": "lenet300", "arguments": {"classes": 4}}}, r"expected \(2, 10\)"),
        ({"prune": {"importance": "nnreleif"}}, "'nnrelief'"),
        ({"prune": {"options": {"vraiant": "paper"}}}, "vraiant"),
        ({"data": {"source": "idx", "path": str(tmp_path / "absent")}}, "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            execute(tiny(**change), out)
        assert not out.exists()


def test_folders_that_cannot_be_taken_up(tiny, execute, tmp_path, no_finish):
    out = tmp_path / "run"
    execute(tiny(), out)
    with pytest.raises(RecipeError, match=r"another recipe \(train\.epochs: 2 -> 3\)"):
        execute(tiny(train={"epochs": 3}), out)
    (out / "result.json").write_text("{}")
    with pytest.raises(RecipeError, match="this run is finished"):
        execute(tiny(), out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(RecipeError, match="not empty and not a run folder"):
        execute(tiny(), tmp_path / "full")
    with pytest.raises(RecipeError, match="is a file"):
        execute(tiny(), tmp_path / "full" / "thesis.tex")


def test_training_that_diverges_is_named(tiny, execute, tmp_path):
    with pytest.raises(ValueError, match="training loss is .*lower the learning rate"):
        execute(tiny(train={"lr": 1e30, "optimizer": "sgd"}), tmp_path / "run")
