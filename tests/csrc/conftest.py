"""The fixture `kernels`: CUDA C++ ops on the emulator, and on a GPU where there is one."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "cuda_host"))


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request):
    """Ops of csrc/cuda with their device, orders of threads and barriers (cuda_host/kernels.py)."""
    from kernels import make

    return make(request.param)
