"""Runs and studies that are killed go on, and end as if nothing had happened."""

from __future__ import annotations

import importlib.util
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

from liveweight.runs import finish
from liveweight.runs.progress import Reporter
from liveweight.runs.prune_run import execute
from liveweight.runs.recipe import from_dict
from liveweight.studies.grid import run_study

PROGRAM = pathlib.Path(__file__).with_name("killed.py")
SHORT = {"epochs": 2, "batch_size": 20, "milestones": [1]}
RECIPE = {
    "model": {"name": "lenet5"},
    "data": {"limit": 60},
    "train": SHORT,
    "retrain": SHORT,
    "prune": {"alpha": {"conv": 0.8, "linear": 0.9}, "iterations": 2, "samples": 50},
    "threads": 1,
}
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("killed", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def kill(*words: object) -> None:
    command = [sys.executable, str(PROGRAM), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def iterates(folder) -> list[dict]:
    return [folder.load_tensors(f"iterates/{i:02d}")[0] for i in range(folder.iterates_done())]


# 3 steps an epoch, 2 epochs a phase: dense, iteration 1, iteration 2
def test_a_killed_run_ends_with_the_same_masks_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "finish", lambda run: None)
    recipe = from_dict(RECIPE)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    whole = iterates(execute(recipe, tmp_path / "whole", QUIET))
    cut = tmp_path / "cut"
    kill("step", 5, "run", tmp_path / "r.yaml", cut)  # in the second epoch of the dense net
    assert not list((cut / "iterates").iterdir())
    kill("step", 8, "run", tmp_path / "r.yaml", cut)  # in the second epoch of iteration 1
    assert [path.name for path in (cut / "iterates").iterdir()] == ["00.safetensors"]
    kill("write", 1, "run", tmp_path / "r.yaml", cut)  # while its state is written
    assert list(cut.glob("*.partial"))
    done: list[tuple[int, int]] = []
    folder = execute(recipe, cut, QUIET, lambda *place: done.append(place))
    assert done == [(1, 2), (2, 1), (2, 2)], "no epoch is repeated whose state was on disk"
    again = iterates(folder)
    assert len(again) == len(whole) == 3
    for one, other in zip(whole, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(key.endswith("_mask") for key in again[2])


def test_a_killed_study_ends_with_the_same_rows_and_masks(program, tmp_path):
    whole = run_study(program.TINY, program.OPTIONS, tmp_path / "whole", reporter=QUIET)
    cut = tmp_path / "cut"
    kill("step", 11, "study", cut)  # 6 steps of the dense net, 3 of the first cell, then 2
    assert [path.name for path in (cut / "cells").iterdir()] == ["method-magnitude_seed-0.json"]
    kill("write", 2, "study", cut)  # the second cell is computed, its row not yet in its place
    assert len(list((cut / "cells").glob("*.json"))) == 1
    again = run_study(program.TINY, program.OPTIONS, cut, reporter=QUIET)
    rows = [entry["row"] for entry in whole.entries()]
    assert [entry["row"] for entry in again.entries()] == rows
    assert len({row["mask"] for row in rows}) == 4, "methods and seeds differ"
    assert (cut / "README.md").read_text().count("4 rows") == 1
