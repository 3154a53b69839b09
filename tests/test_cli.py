from __future__ import annotations

import subprocess
import sys

import pytest

from liveweight import cli


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_teaches_and_exits_0(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for text in (
        "prune RECIPE",
        "compress CHECKPOINT",
        "liveweight prune lenet5-digits",
        "exit codes",
    ):
        assert text in out
    assert run(capsys)[0] == 2  # no verb is not a command


@pytest.mark.parametrize("verb", ["prune", "compress", "bench", "report", "info", "list"])
def test_every_verb_has_help_with_examples(capsys, verb):
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert "examples:" in out and f"liveweight {verb}" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prun"], "no verb 'prun': did you mean 'prune'"),
        (["prune"], "prune needs a RECIPE"),
        (["prune", "lenet5-digits", "--train.epohcs", "3"], "--train.epochs"),
        (["prune", "lenet5-digits", "--train.epochs", "many"], "train.epochs"),
        (["list", "recipe"], "'recipes'"),
        (["list"], "WHAT"),
        (["bench"], "CHECKPOINT"),
        (["info", "more"], "unrecognized arguments: more"),
    ],
)
def test_wrong_command_lines_exit_2_with_one_line(capsys, words, message):
    code, out, err = run(capsys, *words)
    assert code == 2
    assert err.startswith("liveweight: error: ") and err.count("\n") == 1
    assert message in err and not out


def test_expected_errors_exit_1_with_one_line(capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("trian:\n  epochs: 3\n")
    for words, message in (
        (["prune", str(recipe)], "unknown recipe key 'trian': did you mean 'train'"),
        (["prune", "lenet5-digitz"], "did you mean 'lenet5-digits'"),
        (["prune", "lenet5-mnist"], "data.path must be given"),
        (["prune", "lenet5-mnist", "--data.path", str(tmp_path / "no")], "no such folder"),
        (["report", str(tmp_path)], "not a run folder"),
        (["bench", str(tmp_path / "no.safetensors")], "no such file"),
        (["compress", str(recipe), "--model", "lenet5", "--example", "1x0"], "must be a shape"),
        (["compress", str(recipe), "--example", "1x2"], "say which --model"),
        (["bench", str(recipe), "--model", "lenet"], "say the input's shape"),
    ):
        code, _, err = run(capsys, *words)
        assert code == 1, words
        assert err.startswith("liveweight: error: ") and err.count("\n") == 1
        assert message in err


def test_info_and_version(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0 and "mass_mask" in out and "torch" in out
    assert run(capsys, "--version")[1].startswith("liveweight ")


@pytest.mark.parametrize(
    ("what", "texts"),
    [
        ("recipes", ["lenet5-digits", "lenet300-mnist"]),
        ("importances", ["nnrelief", "magnitude", "random", "data"]),
        ("formats", ["unstructured", "bitmap", "semi_structured", "block", "kernelwise", "dense"]),
        ("models", ["lenet5", "431,080", "266,610"]),
        ("ops", ["activity_stats_", "kernelwise_conv2d"]),
    ],
)
def test_list(capsys, what, texts):
    code, out, _ = run(capsys, "list", what)
    assert code == 0
    assert all(text in out for text in texts)


def test_print_config_is_a_recipe(capsys, tmp_path):
    code, out, _ = run(capsys, "prune", "lenet5-digits", "--seed", "9", "--print_config")
    assert code == 0 and "seed: 9" in out


def test_as_a_module():
    command = [sys.executable, "-m", "liveweight", "list", "recipes"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "lenet5-digits" in result.stdout
