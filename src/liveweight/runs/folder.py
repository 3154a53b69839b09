"""The run folder: every file is written whole or not at all, so that a run can be resumed.

recipe.yaml               the resolved recipe
metrics.jsonl             one line per epoch and event
init.safetensors          first weights, for the rewind; rewind.safetensors: those of an epoch
iterates/NN.safetensors   best epoch of phase NN (00: dense) with its masks and facts
state.pt                  the phase that is running, after its last whole epoch
checkpoint.safetensors    the compressed model; dense.safetensors: the dense one
result.json, report.md, plots/*.png
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pathlib
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from liveweight.runs.recipe import Recipe, RecipeError, build

# What may change between an interruption and the resume without changing the result.
_FREE_KEYS = ("out", "report")


def write_atomic(path: pathlib.Path, content: bytes) -> None:
    """Write a file so that a reader, or a resume after a power cut, sees the old or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_tensors(path: pathlib.Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write a safetensors file with facts as JSON in its header, whole or not at all."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(plain, metadata={"facts": json.dumps(facts)}))


def read_tensors(path: pathlib.Path) -> tuple[dict[str, Tensor], dict]:
    """Return (tensors, facts) of what write_tensors wrote; ValueError when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged ({error})") from error


def differing_keys(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Return "key: old -> new" for each key on which two recipes differ."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        name, a, b = prefix + key, old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing_keys(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {a!r} -> {b!r}")
    return found


class RunFolder:
    """A folder that holds one run; opening it for a recipe says whether the run can go on."""

    def __init__(self, path: pathlib.Path | str) -> None:
        self.path = pathlib.Path(path)

    @classmethod
    def open(cls, path: pathlib.Path | str, recipe: Recipe) -> RunFolder:
        """Make the folder, or take up the run in it.

        RecipeError: the run in it is finished, belongs to another recipe (the message names the
        keys that differ), or the folder holds something else.
        """
        folder = cls(path)
        if folder.path.exists() and not folder.path.is_dir():
            raise RecipeError(f"{folder.path}: is a file, expected a run folder")
        if (folder.path / "recipe.yaml").is_file():
            folder._check_same(recipe)
            if folder.finished:
                raise RecipeError(
                    f"{folder.path}: this run is finished; see {folder.path / 'report.md'}, "
                    "or choose another folder with --out"
                )
            return folder
        if folder.path.is_dir() and any(p.suffix != ".partial" for p in folder.path.iterdir()):
            raise RecipeError(
                f"{folder.path}: not empty and not a run folder; choose another --out"
            )
        (folder.path / "iterates").mkdir(parents=True, exist_ok=True)
        plain = dataclasses.replace(recipe, out=None)  # the folder may be moved
        write_atomic(folder.path / "recipe.yaml", plain.to_yaml().encode())
        return folder

    def _check_same(self, recipe: Recipe) -> None:
        try:
            old = yaml.safe_load((self.path / "recipe.yaml").read_text())
        except yaml.YAMLError as error:
            raise RecipeError(f"{self.path / 'recipe.yaml'}: not a YAML file") from error
        # keys that came later have their defaults in an older folder
        old, new = build(old, Recipe).to_dict(), recipe.to_dict()
        old, new = ({k: v for k, v in r.items() if k not in _FREE_KEYS} for r in (old, new))
        if found := differing_keys(old, new):
            raise RecipeError(
                f"{self.path}: holds a run of another recipe ({'; '.join(found)}); "
                "choose another --out"
            )

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").is_file()

    # -- metrics

    @property
    def log_bytes(self) -> int:
        log = self.path / "metrics.jsonl"
        return log.stat().st_size if log.exists() else 0

    def log(self, **row: Any) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def cut_log(self, size: int) -> None:
        """Drop the lines of work that a resume repeats."""
        if self.log_bytes > size:
            os.truncate(self.path / "metrics.jsonl", size)

    def metrics(self) -> list[dict]:
        log = self.path / "metrics.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    # -- tensors

    def save_tensors(self, name: str, tensors: dict[str, Tensor], facts: dict) -> None:
        """Write name.safetensors with facts as JSON in its header."""
        write_tensors(self.path / f"{name}.safetensors", tensors, facts)

    def load_tensors(self, name: str) -> tuple[dict[str, Tensor], dict]:
        """Return (tensors, facts) of name.safetensors; ValueError when it is damaged."""
        return read_tensors(self.path / f"{name}.safetensors")

    def iterates_done(self) -> int:
        """Return how many phases are finished: 0, or 1 + the last iteration."""
        count = 0
        while (self.path / "iterates" / f"{count:02d}.safetensors").is_file():
            count += 1
        return count

    # -- state of the running phase

    def save_state(self, state: dict) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.path / "state.pt", buffer.getvalue())

    def load_state(self) -> dict | None:
        path = self.path / "state.pt"
        if not path.is_file():
            return None
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch.load raises many kinds; all mean a damaged file
            raise ValueError(f"{path}: damaged; remove it to repeat the phase") from error

    def drop_state(self) -> None:
        (self.path / "state.pt").unlink(missing_ok=True)

    # -- result

    def write_text(self, name: str, text: str) -> None:
        write_atomic(self.path / name, text.encode())

    def result(self) -> dict:
        """Return result.json; ValueError when the run is not finished."""
        if not (self.path / "recipe.yaml").is_file():
            raise ValueError(f"{self.path}: not a run folder (no recipe.yaml in there)")
        if not self.finished:
            raise ValueError(
                f"{self.path}: the run is not finished; resume it with: "
                f"liveweight prune {self.path}"
            )
        return json.loads((self.path / "result.json").read_text())
