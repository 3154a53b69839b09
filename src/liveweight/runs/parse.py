"""Recipes from YAML files and command-line overrides, through jsonargparse."""

from __future__ import annotations

import dataclasses
import pathlib
import typing

import jsonargparse
import yaml

from liveweight._check import near_misses
from liveweight.runs.options import RecipeError, check_keys, section_type
from liveweight.runs.recipe import Recipe, find_recipe, from_dict

_EPILOG = """examples:
  liveweight prune lenet5-digits                         the demo, offline, a few minutes
  liveweight prune lenet5-digits --train.epochs 3 --prune.iterations 2 --out runs/short
  liveweight prune lenet5-mnist --data.path MNIST_FOLDER --device cuda
  liveweight prune lenet5-digits --print_config > my.yaml    a recipe to start from
  liveweight prune my.yaml --prune.alpha.conv 0.8
  liveweight prune runs/short                            go on after an interruption
"""


class UsageError(ValueError):
    """A command line that cannot be understood."""


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of `liveweight prune`: one option per key of the recipe."""
    parser = jsonargparse.ArgumentParser(
        prog="liveweight prune",
        usage="liveweight prune RECIPE [--KEY VALUE ...] [--print_config]",
        description="Train, prune, retrain, compress, measure and report, as a recipe says. "
        "RECIPE is a built-in name (liveweight list recipes), a YAML file, or a run folder to "
        "resume. Every key of the recipe is an option; an option overrides the file.",
        epilog=_EPILOG,
        formatter_class=Formatter,
        exit_on_error=False,
    )
    add_options(parser, Recipe)
    return parser


def add_options(parser: jsonargparse.ArgumentParser, options: type) -> None:
    """Give a parser one option per field of a dataclass and of the dataclasses in it."""
    parser.add_argument("--config", action="config", help=jsonargparse.SUPPRESS)
    for prefix, cls in _sections(options):
        title = cls.__doc__.partition("\n")[0].rstrip(".") if prefix else "the run"
        group = parser.add_argument_group(
            f"{prefix or 'general'}: {title}".replace("general: ", "")
        )
        hints = typing.get_type_hints(cls)
        for entry in dataclasses.fields(cls):
            if section_type(entry) is None:
                group.add_argument(
                    f"--{prefix}.{entry.name}" if prefix else f"--{entry.name}",
                    type=hints[entry.name],
                    default=_default(entry),
                    help=entry.metadata["help"].replace("%", "%%"),
                )


class Formatter(jsonargparse.DefaultHelpFormatter):
    """Help that keeps the line breaks of the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


def _sections(options: type) -> list[tuple[str, type]]:
    nested = [(f.name, section_type(f)) for f in dataclasses.fields(options) if section_type(f)]
    return [("", options), *nested]


def _default(entry: dataclasses.Field) -> object:
    if entry.default is not dataclasses.MISSING:
        return entry.default
    return entry.default_factory()


def check_options(
    overrides: list[str], options: type = Recipe, more: tuple[str, ...] = ("print_config",)
) -> None:
    """Raise UsageError for a word --key that is no field of the dataclass and none of `more`."""
    known = {
        f"{prefix}.{entry.name}".lstrip(".")
        for prefix, cls in _sections(options)
        for entry in dataclasses.fields(cls)
        if section_type(entry) is None
    } | {"help", *more}
    for word in overrides:
        if not word.startswith("--"):
            continue
        key = word[2:].partition("=")[0].removesuffix("+")
        inside = any(key.startswith(f"{name}.") for name in known)  # an entry of a dict
        if key not in known and not inside:
            close = near_misses(f"--{key}", [f"--{name}" for name in sorted(known)])
            raise UsageError(f"unknown option --{key}: {close}")


def gather_lists(overrides: list[str], options: type = Recipe) -> list[str]:
    """Return the words with `--seeds 0 1 2` as `--seeds [0,1,2]` where the option is a list."""
    lists = {
        f"--{prefix}.{name}" if prefix else f"--{name}"
        for prefix, cls in _sections(options)
        for name, hint in typing.get_type_hints(cls).items()
        if typing.get_origin(hint) is list
    }
    found: list[str] = []
    values: list[str] | None = None  # of the list option that is being read
    for word in [*overrides, "--"]:
        if not word.startswith("--") and values is not None:
            values.append(word)
            continue
        if values:
            plain = len(values) == 1 and values[0].startswith("[")
            found.append(values[0] if plain else f"[{','.join(values)}]")
        values = [] if word in lists else None
        found.append(word)
    return found[:-1]


def parse_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by built-in name or path and apply overrides such as --train.epochs 3.

    RecipeError: no such recipe, unknown key (with the closest), value of a wrong type or range.
    UsageError: unknown option. --print_config and --help print and leave with SystemExit(0).
    """
    overrides = list(overrides or [])
    check_options(overrides)
    path = find_recipe(name)
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path}: not a YAML file ({reason})") from None
    try:
        check_keys(values, Recipe)
        words = ["--config", str(path), *gather_lists(overrides)]
        parsed = make_parser().parse_args(words)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    except jsonargparse.ArgumentError as error:
        raise UsageError(" ".join(str(error).split())) from None
    parsed.pop("config", None)
    return from_dict(parsed.as_dict())


def run_path(name: str, recipe: Recipe) -> pathlib.Path:
    """Return the run folder: the one named or resumed, else runs/ and the recipe's name."""
    if recipe.out is not None:
        return pathlib.Path(recipe.out)
    path = find_recipe(name)
    if path.name == "recipe.yaml":
        return path.parent
    return pathlib.Path("runs") / path.stem
