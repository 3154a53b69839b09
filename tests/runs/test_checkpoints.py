"""The verbs of the command line on a finished run."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from torch import nn

from liveweight import cli, compress
from liveweight.nn import SparseConv2d, SparseLinear
from liveweight.runs.checkpoints import undo_sparse_
from liveweight.runs.models import build_model


@pytest.fixture(scope="module")
def finished(tiny, execute, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("benchmark", "compress_"):
            quick_measure(patch, name)
        return execute(tiny(), path).path


def quick_measure(patch, name: str) -> None:
    real = getattr(compress, name)
    patch.setattr(compress, name, lambda *a, **k: real(*a, **k, budget_s=0.01))


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_report_is_written_again(run, capsys):
    before = (run / "report.md").read_text()
    (run / "report.md").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.md").read_text() == before
    assert "test:" in capsys.readouterr().out


def test_prune_on_a_finished_folder_says_so(run, capsys):
    assert cli.main(["prune", str(run)]) == 1
    assert "this run is finished" in capsys.readouterr().err


def test_prune_with_another_recipe_names_the_keys(run, capsys):
    (run / "result.json").unlink()
    words = ["prune", str(run), "--seed", "7", "--train.epochs", "9"]
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert "seed: 0 -> 7" in error and "train.epochs: 2 -> 9" in error


def test_report_on_an_unfinished_run_says_how_to_go_on(run, capsys):
    (run / "result.json").unlink()
    assert cli.main(["report", str(run)]) == 1
    assert f"liveweight prune {run}" in capsys.readouterr().err


def test_prune_resumes_by_folder(run, capsys, quick):
    (run / "result.json").unlink()
    (run / "iterates" / "02.safetensors").unlink()
    assert cli.main(["prune", str(run)]) == 0
    out = capsys.readouterr().out
    assert "prune and retrain 2/2" in out and "prune and retrain 1/2" not in out
    assert (run / "result.json").is_file()


def test_a_moved_run_resumes_where_it_is(tiny, execute, tmp_path, capsys, quick):
    recipe = dataclasses.replace(tiny(prune={"iterations": 0}), out=str(tmp_path / "old"))
    execute(recipe, recipe.out)
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "new" / "result.json").unlink()
    assert cli.main(["prune", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "result.json").is_file() and not (tmp_path / "old").exists()
    assert "keep iteration 0: nothing was pruned" in capsys.readouterr().out


def test_bench_of_a_run(run, capsys, quick):
    words = ["bench", str(run / "checkpoint.safetensors"), "--no-compile", "--threads", "1"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "input 64x1x28x28" in out and "dense" in out and "compressed" in out
    assert cli.main([*words, "--example", "2x1x28x28", "--model", "lenet300"]) == 0
    assert "input 2x1x28x28" in capsys.readouterr().out


def test_compress_again_keeps_the_numbers(run, capsys, quick):
    source, target = run / "checkpoint.safetensors", run / "again.safetensors"
    words = ["compress", str(source), "--example", "4x1x28x28", "--out", str(target)]
    assert cli.main([*words, "--threads", "1"]) == 0
    assert "classifier.1" in capsys.readouterr().out
    x = torch.rand(3, 1, 28, 28)
    models = [compress.load(p, build_model("lenet300")).eval() for p in (source, target)]
    with torch.no_grad():
        first, second = (model(x) for model in models)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_a_foreign_file_is_named(run, capsys):
    path = run / "dense.safetensors"
    assert cli.main(["bench", str(path)]) == 1
    assert "dense.safetensors" in capsys.readouterr().err


def test_undo_sparse_brings_joined_modules_back():
    dense = build_model("lenet5", seed=1).eval()
    with torch.no_grad():
        dense.features[3].weight[:, ::2] = 0
    sparse = build_model("lenet5", seed=2).eval()
    sparse.load_state_dict(dense.state_dict())
    parts = ("features.3", "features.4", "features.5")
    sparse.features[3] = SparseConv2d.from_dense(sparse.features[3], activation="relu", pool=2)
    sparse.features[3].parts = parts
    sparse.features[4] = sparse.features[5] = nn.Identity()
    sparse.classifier[1] = SparseLinear.from_dense(sparse.classifier[1])
    restored = undo_sparse_(sparse, build_model("lenet5", seed=3))
    assert [type(m) for m in restored.features] == [type(m) for m in dense.features]
    assert type(restored.classifier[1]) is nn.Linear
    for key, value in dense.state_dict().items():
        assert torch.equal(restored.state_dict()[key], value)


@pytest.mark.parametrize("affine", [True, False])
def test_undo_sparse_leaves_folded_norms_folded(affine):
    conv, x = nn.Conv2d(2, 5, 3), torch.randn(2, 2, 6, 6)
    sparse = SparseConv2d.from_dense(conv)
    sparse.parts = ("0", "1")
    dense = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8, eps=0.1, affine=affine))
    restored = undo_sparse_(nn.Sequential(sparse, nn.Identity()), dense.eval())
    assert restored[1].num_features == 5 and restored[1].affine == affine
    assert restored[1].shrunk_from == {"num_features": 8, "bias": affine}
    with torch.no_grad():
        torch.testing.assert_close(restored(x), conv(x))
