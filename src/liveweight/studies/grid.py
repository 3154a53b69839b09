"""A study: a grid of cells, each computed from its own seed and written as soon as it is done."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor

from liveweight.compress.measure import torch_threads
from liveweight.runs.finish import machine_facts
from liveweight.runs.folder import differing_keys, read_tensors, write_atomic, write_tensors
from liveweight.runs.progress import Reporter
from liveweight.runs.prune_run import denormals_flushed
from liveweight.runs.recipe import RecipeError, build, check_device, option

Cell = dict[str, Any]
Row = dict[str, Any]
Made = tuple[dict[str, Tensor], dict]


@dataclass(frozen=True)
class StudyOptions:
    """What every study takes."""

    seeds: list[int] = option([0, 1, 2], "one training from scratch each")
    threads: int = option(1, "CPU threads; another number may change the last bits")
    device: str = option("cpu", "cpu, cuda or cuda:N")


@dataclass(frozen=True)
class Study:
    """What is compared.

    options  a frozen dataclass of options, StudyOptions and more
    cells    options -> the cells: flat dicts of words and numbers that say what is computed
    run      (cell, options, folder) -> its row: numbers, words and lists of them; from the cell's
             seed alone, so that a repetition gives the same row
    page     (rows, options, folder) -> Markdown; plots are written into the folder. Rows carry the
             keys of their cells and may be fewer than the cells
    """

    name: str
    title: str
    options: type
    cells: Callable[[Any], list[Cell]]
    run: Callable[[Cell, Any, StudyFolder], Row]
    page: Callable[[list[Row], Any, StudyFolder], str]


def slug(cell: Cell) -> str:
    """Return a cell as a file name: method-obd_seed-0_sparsity-0.9."""
    parts = (f"{key}-{value}" for key, value in sorted(cell.items()))
    return "_".join(re.sub(r"[^A-Za-z0-9.+]+", "-", part).strip("-") for part in parts)


class StudyFolder:
    """The folder of a study.

    study.yaml           the study's name and options, and the machine that began it
    cells/CELL.json      the cell, its row and its seconds, one file each
    cache/*.safetensors  what several cells start from
    README.md, *.png     the page; rows.json: every row, enough to write the page again
    """

    def __init__(self, path: pathlib.Path | str, reporter: Reporter | None = None) -> None:
        self.path = pathlib.Path(path)
        self._reporter = reporter or Reporter(quiet=True)

    def note(self, text: str) -> None:
        """Say what is going on."""
        self._reporter.say(text)

    def facts(self) -> dict[str, Any]:
        """Return {"study", "options", "machine"}; RecipeError where the folder holds no study."""
        path = self.path / "study.yaml"
        if not path.is_file():
            raise RecipeError(f"{self.path}: not a study's folder (no study.yaml in there)")
        return yaml.safe_load(path.read_text())

    def begin(self, study: Study, options: Any) -> None:
        """Make the folder, or take up the study in it.

        RecipeError: it holds a study of other options (the keys that differ are named; seeds may
        be added), another study, or something else.
        """
        if (self.path / "study.yaml").is_file():
            self._check_same(study, options)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RecipeError(f"{self.path}: not empty and not a study's; choose another --out")
        (self.path / "cells").mkdir(parents=True, exist_ok=True)
        machine = machine_facts(torch.device(options.device))
        if (self.path / "study.yaml").is_file():
            machine = self.facts()["machine"]
        facts = {
            "study": study.name,
            "options": dataclasses.asdict(options),
            "machine": {key: str(value) for key, value in machine.items()},
        }
        text = yaml.safe_dump(facts, sort_keys=False)
        write_atomic(self.path / "study.yaml", text.encode())

    def _check_same(self, study: Study, options: Any) -> None:
        facts = self.facts()
        if facts["study"] != study.name:
            raise RecipeError(f"{self.path}: holds the study {facts['study']!r}, not {study.name}")
        old = dataclasses.asdict(build(facts["options"], study.options))
        new = dataclasses.asdict(options)
        for values in (old, new):  # data may be moved
            values.get("data", {}).pop("path", None)
        added = set(old.pop("seeds")) <= set(new.pop("seeds"))
        found = differing_keys(old, new) + ([] if added else ["seeds: some are left out"])
        if found:
            raise RecipeError(
                f"{self.path}: holds a study of other options ({'; '.join(found)}); choose "
                "another --out"
            )

    def done(self, cell: Cell) -> bool:
        return self._file(cell).is_file()

    def write(self, cell: Cell, row: Row, seconds: float) -> None:
        """Write a cell's row whole or not at all. ValueError: the row is not plain JSON."""
        content = {"cell": cell, "row": row, "seconds": round(seconds, 2)}
        write_atomic(self._file(cell), json.dumps(content).encode())

    def _file(self, cell: Cell) -> pathlib.Path:
        return self.path / "cells" / f"{slug(cell)}.json"

    def entries(self) -> list[dict]:
        """Return {"cell", "row", "seconds"} of every cell that is done."""
        files = sorted((self.path / "cells").glob("*.json"))
        if files or not (self.path / "rows.json").is_file():
            return [json.loads(file.read_text()) for file in files]
        return json.loads((self.path / "rows.json").read_text())

    def cached(self, name: str, make: Callable[[], Made]) -> Made:
        """Return (tensors, facts) by name: made once, then read from cache/NAME.safetensors.

        Where two processes make them at once, they make the same.
        """
        path = self.path / "cache" / f"{name}.safetensors"
        if not path.is_file():
            write_tensors(path, *make())
        try:
            return read_tensors(path)
        except ValueError as error:
            raise ValueError(f"{error}; remove it to make it again") from error


def run_study(
    study: Study,
    options: Any,
    out: str | pathlib.Path,
    *,
    part: tuple[int, int] = (0, 1),
    only: Callable[[Cell], bool] = lambda cell: True,
    reporter: Reporter | None = None,
) -> StudyFolder:
    """Compute the cells that are missing in the folder `out`, then write the page.

    part  (i, n): only every n-th cell from i on, so that n processes can share a folder
    only  only cells for which it is true

    RecipeError, ValueError: options, data or the folder cannot be used.
    """
    index, count = part
    if not 0 <= index < count:
        raise RecipeError(f"part must be i/n with 0 <= i < n, got {index}/{count}")
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise RecipeError(f"seeds must be different whole numbers, got {options.seeds}")
    check_device(options.device)
    cells = study.cells(options)
    check_cells(cells)
    folder = StudyFolder(out, reporter or Reporter())
    with torch_threads(options.threads):
        folder.begin(study, options)
    mine = [c for c in itertools.islice(cells, index, None, count) if only(c)]
    missing = [cell for cell in mine if not folder.done(cell)]
    if len(missing) < len(mine):
        folder.note(f"{len(mine) - len(missing)} of {len(mine)} cells are there already")
    with torch_threads(options.threads), denormals_flushed():
        for i, cell in enumerate(missing, 1):
            _run_cell(study, cell, options, folder, f"{i}/{len(missing)}")
    if all(folder.done(cell) for cell in cells):
        write_page(study, folder)
        folder.note(f"page: {folder.path / 'README.md'}")
    return folder


def check_cells(cells: Sequence[Cell]) -> None:
    """Raise ValueError where two cells would share a file."""
    names = [slug(cell) for cell in cells]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two cells have one name: {sorted(twice)[0]}")


def _run_cell(study: Study, cell: Cell, options: Any, folder: StudyFolder, place: str) -> None:
    words = ", ".join(f"{key} {value}" for key, value in cell.items())
    folder.note(f"{place}: {words}")
    start = time.perf_counter()
    torch.manual_seed(int.from_bytes(hashlib.sha256(slug(cell).encode()).digest()[:4], "big"))
    row = study.run(cell, options, folder)
    folder.write(cell, row, time.perf_counter() - start)


def write_page(study: Study, folder: StudyFolder) -> None:
    """Write README.md, its plots and rows.json from the cells that are done."""
    from liveweight.studies.page import frame

    facts, entries = folder.facts(), folder.entries()
    options = build(facts["options"], study.options)
    order = {slug(cell): i for i, cell in enumerate(study.cells(options))}
    entries = sorted(
        (e for e in entries if slug(e["cell"]) in order), key=lambda e: order[slug(e["cell"])]
    )
    if not entries:
        raise RecipeError(f"{folder.path}: no cell is done yet")
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    write_atomic(folder.path / "rows.json", f"[\n{lines}\n]\n".encode())
    body = study.page([e["cell"] | e["row"] for e in entries], options, folder)
    text = frame(study, options, facts["machine"], body, entries, len(order))
    write_atomic(folder.path / "README.md", text.encode())


def export(study: Study, folder: StudyFolder, target: str | pathlib.Path) -> StudyFolder:
    """Write the page and what it needs, without cells and cache, into another folder."""
    write_page(study, folder)
    copy = StudyFolder(target)
    copy.path.mkdir(parents=True, exist_ok=True)
    facts = folder.facts()
    data = facts["options"].get("data", {})
    if data.get("path"):
        data["path"] = pathlib.PurePath(data["path"]).name  # where it lay is nobody's business
    write_atomic(copy.path / "study.yaml", yaml.safe_dump(facts, sort_keys=False).encode())
    write_atomic(copy.path / "rows.json", (folder.path / "rows.json").read_bytes())
    write_page(study, copy)
    return copy
