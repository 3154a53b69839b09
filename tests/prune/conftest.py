from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest

_spec = importlib.util.spec_from_file_location(
    "prune_nets", pathlib.Path(__file__).with_name("nets.py")
)
_nets = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _nets  # pickle finds the models' classes by this name
_spec.loader.exec_module(_nets)


@pytest.fixture(scope="session")
def nets():
    """The models of nets.py (tests run without packages, so it cannot be imported by name)."""
    return _nets
