"""One page from several finished runs, of one recipe under several seeds or of several recipes.

README.md      the page
results.json   what the page is made of: recipe and figures of every run
NAME.yaml      the recipe of each group, as its first seed ran it
NAME-*.png     plots

A page folder is a source like a run folder: the page can be made again without the runs, and later
runs can be added to it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from liveweight.runs.folder import RunFolder, write_atomic
from liveweight.runs.parse import parse_recipe
from liveweight.runs.recipe import Recipe, built_in_recipes, from_dict

_VERSION = 1
_KEPT = ("machine", "data", "chosen", "reason", "validation", "test", "latency", "files", "notes")


@dataclass(frozen=True)
class FinishedRun:
    """A run as the page needs it: name of its folder, its recipe, and figures of its result."""

    name: str
    recipe: Recipe
    result: dict

    @property
    def kept(self) -> dict:
        """The iterate that was kept."""
        return self.result["iterates"][self.result["chosen"]]

    @property
    def fewer(self) -> float:
        """Weights of the dense model over those of the kept one."""
        return self.kept["total"] / max(self.kept["kept"], 1)

    @property
    def gain(self) -> float:
        """Test accuracy of the compressed model minus the dense one's, in points."""
        return 100 * (self.result["test"]["compressed"] - self.result["test"]["dense"])

    @property
    def smaller(self) -> float:
        """Bytes of the dense checkpoint over those of the compressed one."""
        files = self.result["files"]
        return files["dense.safetensors"] / files["checkpoint.safetensors"]

    @property
    def latency(self) -> dict[int, dict[str, dict]]:
        """Batch size -> name of the model -> {"median_us", "speedup" over dense}."""
        return {
            block["batch"]: {row["name"]: row for row in block["rows"]}
            for block in self.result["latency"]
        }

    def speedup(self, batch: int, against: str) -> float | None:
        """Speed-up of the compressed model over another; None where that was not measured."""
        rows = self.latency.get(batch, {})
        return rows["compressed"]["speedup"] / rows[against]["speedup"] if against in rows else None


@dataclass(frozen=True)
class Group:
    """Runs of one recipe, in the order of their seeds."""

    name: str
    runs: list[FinishedRun]

    @property
    def recipe(self) -> Recipe:
        """The recipe of the first seed."""
        return self.runs[0].recipe

    @property
    def seeds(self) -> list[int]:
        return [run.recipe.seed for run in self.runs]

    @property
    def batches(self) -> list[int]:
        """Batch sizes of the latency tables."""
        return list(self.runs[0].latency)

    def values(self, pick: Callable[[FinishedRun], float]) -> list[float]:
        """Return one figure of every run."""
        return [pick(run) for run in self.runs]


def write_page(
    sources: Sequence[str | pathlib.Path],
    out: str | pathlib.Path,
    say: Callable[[str], None] = print,
) -> pathlib.Path:
    """Write the page of finished runs into the folder out and return the path of its README.md.

    sources are run folders and page folders. ValueError: a run is not finished, two are of the same
    recipe and seed, or out holds a README.md that is no such page; nothing is written then.
    """
    from liveweight.runs.collect_page import render

    out = pathlib.Path(out)
    page = out / "README.md"
    if page.exists() and not is_page(out):
        raise ValueError(f"{page} is not a page of runs; choose another --page")
    groups = gather(sources)
    out.mkdir(parents=True, exist_ok=True)
    try:
        from liveweight.runs.collect_plots import draw

        drawn = draw(groups, out)
    except ImportError:
        say("no plots: matplotlib is not installed (pip install 'liveweight[plots]')")
        drawn = []
    for group in groups:
        write_atomic(out / f"{group.name}.yaml", group.recipe.to_yaml().encode())
    rows = [dataclasses.asdict(run) for group in groups for run in group.runs]
    content = json.dumps({"version": _VERSION, "runs": rows}, indent=1)
    write_atomic(out / "results.json", content.encode())
    write_atomic(page, render(groups, drawn).encode())
    say(f"page: {page}")
    return page


def is_page(path: str | pathlib.Path) -> bool:
    """Return whether a folder holds a page of runs."""
    return (pathlib.Path(path) / "results.json").is_file()


def gather(sources: Sequence[str | pathlib.Path]) -> list[Group]:
    """Read run and page folders and return their runs by recipe, in the order they were named."""
    found: dict[str, list[FinishedRun]] = {}
    for source in map(pathlib.Path, sources):
        for run in read_page(source) if is_page(source) else [read_run(source)]:
            found.setdefault(_sort_key(run.recipe), []).append(run)
    groups: list[Group] = []
    for runs in found.values():
        runs.sort(key=lambda run: run.recipe.seed)
        for one, other in zip(runs, runs[1:], strict=False):
            if one.recipe.seed == other.recipe.seed:
                raise ValueError(
                    f"{one.name} and {other.name} are runs of one recipe with the same seed "
                    f"({one.recipe.seed}); name one of them"
                )
        name = group_name(runs)
        taken = [group.name for group in groups]
        while name in taken:
            stem, _, number = name.rpartition("~")
            name = f"{stem}~{int(number) + 1}" if stem else f"{name}~2"
        groups.append(Group(name, runs))
    return groups


def _sort_key(recipe: Recipe) -> str:
    """Return what runs of one group have in common: everything but seed, folders and plots."""
    return json.dumps(comparable(recipe), sort_keys=True)


def comparable(recipe: Recipe) -> dict:
    """Return a recipe's keys without those that leave a result as it is, and without the seed."""
    data = dataclasses.replace(recipe.data, path=None)
    report = dataclasses.replace(recipe.report, plots=True)
    return dataclasses.replace(recipe, data=data, report=report, seed=0, out=None).to_dict()


def group_name(runs: Sequence[FinishedRun]) -> str:
    """Return a built-in recipe's name, or what the folders' names share without their seeds."""
    for name in built_in_recipes():
        if comparable(built_in(name)) == comparable(runs[0].recipe):
            return name
    names = [re.sub(rf"[-_.](s|seed)?[-_]?{r.recipe.seed}$", "", r.name) for r in runs]
    return os.path.commonprefix(names).rstrip("-_.") or runs[0].recipe.model.name


@functools.cache
def built_in(name: str) -> Recipe:
    """Return a recipe that ships with the package, whatever data it is given."""
    return parse_recipe(name, ["--data.path", "."])


def read_run(path: pathlib.Path) -> FinishedRun:
    """Read a run folder; ValueError where the run is not finished or a file of it is damaged."""
    folder = RunFolder(path)
    try:
        result = folder.result()
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / 'result.json'}: damaged ({error})") from None
    recipe = parse_recipe(str(path / "recipe.yaml"))
    if recipe.data.path is not None:  # where the data lay on one machine is of no use elsewhere
        data = dataclasses.replace(recipe.data, path=pathlib.PurePath(recipe.data.path).name)
        recipe = dataclasses.replace(recipe, data=data)
    plain = dataclasses.replace(recipe, out=None)
    return FinishedRun(path.resolve().name, plain, compact(result))


def compact(result: dict) -> dict:
    """Return what a page shows of result.json: per-layer rows of the kept iterate alone."""
    drop = ("rows", "pruned", "layers", "log_bytes")
    small = {key: result[key] for key in _KEPT}
    small["iterates"] = [
        {key: value for key, value in row.items() if key not in drop} for row in result["iterates"]
    ]
    choices = (result["compress"]["choices"] or {}).get("layers", [])
    chosen = {row["name"]: row["chosen"] for row in choices}
    small["layers"] = [
        row | {"kernel": chosen.get(row["name"], "dense")}
        for row in result["iterates"][result["chosen"]]["rows"]
    ]
    if result.get("budget"):
        small["budget"] = result["budget"]
    return small


def read_page(path: pathlib.Path) -> list[FinishedRun]:
    """Read the runs of a page folder; ValueError where results.json is of another kind."""
    file = path / "results.json"
    try:
        content = json.loads(file.read_text())
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}, expected {_VERSION}")
        return [
            FinishedRun(row["name"], from_dict(row["recipe"]), row["result"])
            for row in content["runs"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the runs of a page ({error})") from None
