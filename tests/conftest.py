"""Fixtures for the whole suite; without a GPU, Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch

if not torch.cuda.is_available():
    # Read when @triton.jit runs, so it must be set before any kernel module is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# No test reads or writes the choices that the user's machine remembers.
os.environ["LIVEWEIGHT_CACHE"] = "off"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of the development data; tests that need it skip where it is absent."""
    folder = pathlib.Path(
        os.environ.get(
            "LIVEWEIGHT_SHARED_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"
        )
    )
    if not folder.is_dir():
        pytest.skip(f"no development data at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def gpu() -> torch.device:
    """The CUDA device; tests that use it skip where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
