"""The emulator that runs CUDA C++ on the CPU: what it computes, and what it refuses."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

HOST = pathlib.Path(__file__).resolve().parents[1] / "cuda_host"


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, list[str]]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the emulator of CUDA C++ cannot be compiled")
    program = tmp_path_factory.mktemp("selftest") / "selftest"
    subprocess.run(
        [compiler, "-std=c++20", "-O1", "-Wno-unknown-pragmas", "-include", "cuda_host.h"]
        + ["-I.", "-I../../csrc/cuda", "selftest.cpp", "-o", str(program)],
        cwd=HOST,
        check=True,
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    lines: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, text = line.partition(": ")
        lines.setdefault(name, []).append(text)
    return lines


def test_collectives_and_atomics_give_their_values_in_every_order(printed):
    # No lane saw a wrong value; the largest thread number of 3 x 2 blocks of 96 is 287.
    assert printed["exchange"] == ["0 287"] * 3


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("two barriers", "while others wait at line"),
        ("early return", "returned"),
        ("half warp", "deadlock"),
        ("barrier beside collective", "deadlock"),
    ],
)
def test_misused_barriers_and_collectives_are_reported_in_every_order(printed, name, complaint):
    assert len(printed[name]) == 3
    for text in printed[name]:
        assert complaint in text


def test_every_half_pattern_is_widened_as_the_compiler_does(printed):
    assert printed["halves"] == ["0"]
