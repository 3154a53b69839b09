"""The helper module of small networks, as a fixture: test folders are not packages."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest


@pytest.fixture(scope="session")
def nets():
    """The module tests/compress/nets.py."""
    path = pathlib.Path(__file__).with_name("nets.py")
    spec = importlib.util.spec_from_file_location("compress_nets", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
