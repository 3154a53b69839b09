"""A tiny pruning run and quick measurements."""

from __future__ import annotations

import copy
import functools

import pytest

from liveweight import compress
from liveweight.runs import prune_run
from liveweight.runs.progress import Reporter
from liveweight.runs.recipe import from_dict

SHORT = {"epochs": 2, "batch_size": 20, "milestones": [1]}
TINY = {
    "model": {"name": "lenet300"},
    "data": {"limit": 100},
    "train": SHORT,
    "retrain": SHORT,
    "prune": {"alpha": 0.9, "iterations": 2, "samples": 50, "tolerance": 100.0},
    "compress": {"batch_sizes": [4]},
    "threads": 1,
    "report": {"batch_sizes": [4], "torch_compile": False, "plots": False},
}


@pytest.fixture(scope="session")
def tiny():
    """Return a function: recipe of a run of a second or two, with sections updated."""

    def make(**sections):
        values = copy.deepcopy(TINY)
        for key, value in sections.items():
            values[key] = values[key] | value if isinstance(value, dict) else value
        return from_dict(values)

    return make


@pytest.fixture
def quick(monkeypatch):
    """Measure only as long as it takes to have a figure."""
    for name in ("benchmark", "compress_"):
        short = functools.partial(getattr(compress, name), budget_s=0.01)
        monkeypatch.setattr(compress, name, short)


@pytest.fixture(scope="session")
def execute():
    """Run a recipe without output."""
    return functools.partial(prune_run.execute, reporter=Reporter(quiet=True))
