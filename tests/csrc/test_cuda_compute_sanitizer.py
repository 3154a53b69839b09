"""How compute_sanitizer.py calls NVIDIA's tool and reads its answer; a script stands in for it."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "cuda_host" / "compute_sanitizer.py"
FAKE = """#!/bin/sh
[ "$1" = --help ] && {{ echo "{help}"; exit 0; }}
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> calls
{body}
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs the script with a stand-in that does `body`; returns its result and the calls."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))

    def called(body: str, *options: str, known: str = "--kernel-name arg"):
        (tmp_path / "bin").mkdir()
        fake = tmp_path / "bin" / "compute-sanitizer"
        calls = tmp_path / "calls"
        fake.write_text(FAKE.format(body=body, help=known).replace(">> calls", f">> {calls}"))
        fake.chmod(0o755)
        command = [sys.executable, str(SCRIPT), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        return done, calls.read_text().splitlines()

    return called


def test_both_tools_run_the_sanitized_gpu_tests(call):
    done, calls = call("echo 12 passed, 3 deselected in 4.0s")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "memcheck: clean; 12 passed, 3 deselected in 4.0s",
        "racecheck: clean; 12 passed, 3 deselected in 4.0s",
    ]
    for tool, arguments in zip(("memcheck", "racecheck"), calls, strict=True):
        start = f"1 --tool {tool} --error-exitcode 86 --kernel-name kns=liveweight "
        assert arguments.startswith(start)
        assert arguments.endswith("tests/csrc -m gpu and sanitized -k not graph")


def test_all_tests_and_the_older_name_of_an_option(call):
    _, calls = call("echo 1 passed", "--all", known="--kernel-regex arg")
    assert "--kernel-regex kns=liveweight" in calls[0] and "-m gpu -k" in calls[0]


def test_a_report_is_an_error_and_is_shown(call):
    done, _ = call('[ "$2" = racecheck ] && { echo a hazard; exit 86; }; echo 5 passed')
    assert done.returncode == 1
    assert "memcheck: clean" in done.stdout and "racecheck: reported errors" in done.stdout
    assert "a hazard" in done.stdout


@pytest.mark.parametrize("body", ["echo 1 failed, 5 passed; exit 1", "echo no tests ran; exit 5"])
def test_failed_or_missing_tests_are_errors(call, body):
    done, _ = call(body)
    assert done.returncode == 1 and "clean" not in done.stdout


def test_time_that_ran_out_is_said(call):
    done, _ = call("exec /bin/sleep 20", "--seconds", "0.5")
    assert done.returncode == 3
    assert done.stdout.count("not finished in 1 s") == 2


def test_without_the_tool_nothing_is_claimed(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "compute-sanitizer not found" in done.stdout
