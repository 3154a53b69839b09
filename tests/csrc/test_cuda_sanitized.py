"""The tests marked `sanitized`, once more under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "cuda_host" / "sanitized.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    command = [sys.executable, str(RUN), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture(autouse=True)
def _can_compile():
    import emulated

    if emulated.sanitizers():
        pytest.skip("this process is the sanitized one")
    if not emulated.available():
        pytest.skip("no g++: the emulator of CUDA C++ cannot be compiled")


def test_emulated_kernels_are_clean_under_address_and_undefined_sanitizers():
    done = run()
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]
