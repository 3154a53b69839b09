from __future__ import annotations

import pytest
import yaml

from liveweight.runs.parse import UsageError, gather_lists, make_parser, parse_recipe, run_path
from liveweight.runs.recipe import (
    Recipe,
    RecipeError,
    built_in_recipes,
    from_dict,
)


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_built_in_recipes_parse_and_are_the_published_settings():
    assert set(built_in_recipes()) == {
        "lenet5-digits",
        "lenet300-digits",
        "lenet5-mnist",
        "lenet300-mnist",
        *CIFAR,
    }
    for name in ("lenet5-mnist", "lenet300-mnist"):
        recipe = parse_recipe(name, ["--data.path", "somewhere"])
        assert recipe.train == recipe.retrain
        assert (recipe.train.epochs, recipe.train.batch_size) == (60, 120)
        assert (recipe.train.lr, recipe.train.milestones, recipe.train.gamma) == (1e-3, [30], 0.1)
        assert recipe.train.weight_decay == 5e-4
        assert recipe.prune.alpha == {"conv": 0.9, "linear": 0.95}
        assert (recipe.prune.rewind, recipe.prune.samples) == ("init", 1000)
        assert recipe.prune.options["norm"] == "l1"


# net: optimizer, lr, alpha of Linear, iterations, samples, epochs and milestones (train, retrain)
VGG = ("adam", 1e-3, 0.95, 6, 1000, (150, [80, 120]), (60, [20, 40]))
RESNET_SGD = ("sgd", 0.1, 0.99, 10, 1000, (150, [80, 120]), (60, [20, 40]))
RESNET_ADAM = ("adam", 1e-3, 0.99, 10, 2000, (200, [120, 160]), (80, [30, 60]))
CIFAR = {
    "vgg-like-cifar10": VGG,
    "vgg13-cifar10": VGG,
    "vgg16-cifar10": VGG,
    "vgg13-cifar100": VGG,
    "vgg16-cifar100": VGG,
    "resnet20-cifar10": RESNET_SGD,
    "resnet56-cifar10": RESNET_SGD,
    "resnet20-cifar100": RESNET_ADAM,
    "resnet56-cifar100": RESNET_ADAM,
}


@pytest.mark.parametrize(("name", "published"), CIFAR.items())
def test_recipes_for_cifar_are_the_published_settings(name, published):
    optimizer, lr, alpha, iterations, samples, train, retrain = published
    recipe = parse_recipe(name, ["--data.path", "somewhere"])
    assert recipe.model.name == name.rpartition("-")[0]
    assert recipe.model.arguments == ({"classes": 100} if name.endswith("100") else {})
    for phase, (epochs, milestones) in ((recipe.train, train), (recipe.retrain, retrain)):
        assert (phase.optimizer, phase.lr, phase.gamma) == (optimizer, lr, 0.1)
        assert (phase.epochs, phase.milestones) == (epochs, milestones)
        assert (phase.weight_decay, phase.momentum, phase.batch_size) == (5e-4, 0.9, 120)
        assert (phase.augment, phase.precision) == (["crop", "flip"], "auto")
    assert recipe.prune.alpha == {"conv": 0.95, "linear": alpha}
    assert (recipe.prune.iterations, recipe.prune.samples) == (iterations, samples)
    assert (recipe.prune.rewind, recipe.prune.options) == ("none", {"variant": "authors"})
    assert recipe.data.mean == [0.485, 0.456, 0.406]
    assert recipe.data.std == [0.229, 0.224, 0.225]


def test_recipes_that_were_written_before_train_as_before():
    recipe = parse_recipe("lenet5-digits")
    assert (recipe.train.augment, recipe.train.precision) == ([], "fp32")
    assert recipe.train.channels_last


def test_overrides_reach_nested_keys_and_leave_the_rest():
    recipe = parse_recipe(
        "lenet5-digits",
        ["--train.epochs", "3", "--prune.alpha.conv=0.5", "--compress.batch_sizes", "[2, 8]"],
    )
    base = parse_recipe("lenet5-digits")
    assert recipe.train.epochs == 3
    assert recipe.prune.alpha == {**base.prune.alpha, "conv": 0.5}
    assert recipe.compress.batch_sizes == [2, 8]
    assert recipe.retrain == base.retrain


def test_the_resolved_recipe_reads_back_equal(tmp_path):
    recipe = parse_recipe("lenet5-digits", ["--seed", "5", "--model.arguments", "{classes: 10}"])
    again = parse_recipe(write(tmp_path / "r.yaml", recipe.to_yaml()))
    assert again == recipe
    assert from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_unknown_keys_name_the_closest(tmp_path):
    path = write(tmp_path / "r.yaml", "train: {epohcs: 3}\n")
    with pytest.raises(RecipeError, match=r"unknown recipe key 'train\.epohcs'.*'epochs'"):
        parse_recipe(path)
    path = write(tmp_path / "r.yaml", "prunning: {iterations: 3}\n")
    with pytest.raises(RecipeError, match=r"unknown recipe key 'prunning'.*'prune'"):
        parse_recipe(path)
    with pytest.raises(UsageError, match=r"unknown option --train\.epohcs.*'--train\.epochs'"):
        parse_recipe("lenet5-digits", ["--train.epohcs", "3"])


def test_unknown_recipe_lists_near_misses():
    with pytest.raises(RecipeError, match="'lenet5-digits'"):
        parse_recipe("lenet5-digit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not a YAML file"),
        ("- 1\n- 2\n", "expected keys and values"),
        ("train: 3\n", "train: expected keys and values, got 3"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(write(tmp_path / "r.yaml", text))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune": {"alpha": 1.5}}, r"prune\.alpha must be in \[0, 1\], got 1.5"),
        ({"prune": {"alpha": {"conv": -0.1}}}, r"prune\.alpha\.conv must be in \[0, 1\], got -0.1"),
        ({"prune": {"sparsity": 2.0}}, r"prune\.sparsity must be in \[0, 1\], got 2.0"),
        ({"prune": {}}, "either alpha or sparsity"),
        ({"prune": {"alpha": 0.9, "sparsity": 0.9}}, "either alpha or sparsity"),
        ({"prune": {"alpha": 0.9, "rewind": 61}}, "rewind must be .* epoch of train from 1 to 60"),
        ({"prune": {"alpha": 0.9, "rewind": 0}}, "rewind must be .* from 1 to 60, got 0"),
        ({"prune": {"alpha": 0.9, "rewind": "ini"}}, "rewind must be one of init, none.*'init'"),
        ({"prune": {"alpha": 0.9, "keep": "small"}}, "keep must be one of.*'smallest'"),
        ({"prune": {"alpha": 0.9, "samples": 0}}, r"prune\.samples must be 1 or more, got 0"),
        ({"prune": {"alpha": 0.9, "block": [3]}}, r"prune\.block must be empty or 2 numbers"),
        ({"prune": {"pattern": [1, 2]}}, r"prune\.pattern must be empty or 3 numbers"),
        ({"prune": {"alpha": 0.9, "pattern": [1, 2, 4]}}, "leave out alpha and sparsity"),
        ({"train": {"epochs": 0}}, r"train\.epochs must be 1 or more, got 0"),
        ({"retrain": {"lr": 0.0}}, r"retrain\.lr must be above 0, got 0.0"),
        ({"train": {"optimizer": "adm"}}, "'adam'"),
        ({"train": {"augment": ["corp"]}}, r"train\.augment must be one of crop, flip.*'crop'"),
        ({"retrain": {"precision": "fp16"}}, r"retrain\.precision must be one of fp32, bf16, auto"),
        ({"data": {"source": "idx"}}, r"data\.path must be given for data\.source 'idx'"),
        ({"data": {"size": [3]}}, r"data\.size"),
        ({"data": {"mean": [0.5], "std": []}}, r"data\.std must be as long"),
        ({"compress": {"batch_sizes": []}}, r"compress\.batch_sizes"),
        ({"compress": {"min_speedup": 0.5}}, r"min_speedup must be 1 or more"),
        ({"device": "gpu"}, "device must be cpu, cuda"),
        ({"device": "cuda:77"}, "torch sees"),
        ({"threads": 0}, "threads must be 1 or more"),
    ],
)
def test_values_are_checked_before_any_work(values, message):
    values = {"prune": {"alpha": 0.9}} | values
    with pytest.raises(RecipeError, match=message):
        from_dict(values)


def test_wrong_types_on_the_command_line():
    with pytest.raises(UsageError, match=r"train\.epochs.*int.*x"):
        parse_recipe("lenet5-digits", ["--train.epochs", "x"])


def test_print_config_prints_a_recipe_that_parses(capsys, tmp_path):
    with pytest.raises(SystemExit) as leave:
        parse_recipe("lenet5-digits", ["--train.epochs", "3", "--print_config"])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    assert parse_recipe(write(tmp_path / "r.yaml", text)).train.epochs == 3


def test_help_teaches_every_key(capsys):
    make_parser().print_help()
    text = capsys.readouterr().out
    for key in ("--prune.alpha", "--retrain.epochs", "--compress.batch_sizes", "--device"):
        assert key in text
    assert "liveweight prune lenet5-mnist --data.path" in text


def test_run_path_follows_out_the_resumed_folder_or_the_name(tmp_path):
    assert str(run_path("lenet5-digits", Recipe(out="a/b"))) == "a/b"
    assert run_path("lenet5-digits", Recipe()).name == "lenet5-digits"
    write(tmp_path / "recipe.yaml", "seed: 1\n")
    assert run_path(str(tmp_path), Recipe()) == tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train.milestones", "3", "5", "--seed", "1"], ["--train.milestones", "[3,5]"]),
        (["--train.milestones", "[3,5]"], ["--train.milestones", "[3,5]"]),
        (["--data.mean", "-0.5", "1e-3"], ["--data.mean", "[-0.5,1e-3]"]),
        (["--prune.ignore", "a.*"], ["--prune.ignore", "[a.*]"]),
        (["--train.milestones=[3]", "--seed", "2"], ["--train.milestones=[3]"]),
        (["--train.milestones", "--seed", "2"], ["--train.milestones", "--seed", "2"]),
    ],
)
def test_lists_as_words(words, expected):
    assert gather_lists(words)[: len(expected)] == expected


def test_list_options_of_the_command_line():
    recipe = parse_recipe("lenet5-digits", ["--train.milestones", "3", "5", "--prune.ignore", "a"])
    assert recipe.train.milestones == [3, 5] and recipe.prune.ignore == ["a"]
    assert parse_recipe("lenet5-digits", ["--train.milestones", "7"]).train.milestones == [7]
