"""The tests marked `sanitized`, once more under AddressSanitizer and UBSan."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

HOST = pathlib.Path(__file__).resolve().parents[1] / "cuda_host"
# What the sanitizers say of each fault of faults.cpp, by its number.
REPORTS = [
    "heap-buffer-overflow",
    "heap-buffer-overflow",
    "misaligned address",
    "signed integer overflow",
    "heap-buffer-overflow",
]


@pytest.fixture(autouse=True)
def emulated():
    import emulated

    if emulated.sanitizers():
        pytest.skip("this process is the sanitized one")
    if not emulated.available():
        pytest.skip("no g++: the emulator of CUDA C++ cannot be compiled")
    return emulated


def test_emulated_kernels_are_clean_under_address_and_undefined_sanitizers():
    command = [sys.executable, str(HOST / "sanitized.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]


def test_sanitizers_notice_each_fault_of_a_kernel(emulated, monkeypatch, tmp_path):
    monkeypatch.setenv("LIVEWEIGHT_SANITIZE", "address,undefined")
    program = tmp_path / "faults"
    command = [*emulated.compiler(), "-include", "cuda_host.h", "faults.cpp", "-o", str(program)]
    subprocess.run(command, cwd=HOST, check=True)
    for which, report in enumerate(REPORTS):
        done = subprocess.run([str(program), str(which)], capture_output=True, text=True)
        assert done.returncode != 0 and report in done.stderr, (which, done.stderr[-3000:])
    done = subprocess.run([str(program), "-1"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "sound\n", done.stderr
