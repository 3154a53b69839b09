"""Run the GPU tests of the CUDA C++ kernels under compute-sanitizer's memcheck and racecheck.

    python tests/cuda_host/compute_sanitizer.py                 # those marked `sanitized`
    python tests/cuda_host/compute_sanitizer.py --all           # all of tests/csrc, minutes
    python tests/cuda_host/compute_sanitizer.py --seconds 60    # so long for both tools together

memcheck finds accesses outside a tensor and misaligned ones, racecheck shared memory that two
threads use without a barrier in between: what the emulator cannot know, the memory model included.
Prints one line a tool. Exit code: 0 clean, 1 a report or a failed test, 2 could not run, 3 no time.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck")
REPORTED = 86  # exit code of a run with a report
CLEAN, FAILED, CANNOT, NO_TIME = range(4)


def find() -> str | None:
    """Return compute-sanitizer of $CUDA_HOME, or of the PATH."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = os.pathsep.join(os.path.join(home, name) for name in ("bin", "compute-sanitizer"))
    return shutil.which("compute-sanitizer", path=folders) or shutil.which("compute-sanitizer")


def command(program: str, tool: str, everything: bool) -> list[str]:
    """Return the command that runs one tool over our kernels alone, torch's left out."""
    known = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    # The older name of the option and the newer one.
    only = "--kernel-name" if "--kernel-name " in known else "--kernel-regex"
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/csrc"]
    # Allocations of their own inside a graph's capture are what memcheck's run forbids.
    marks = "gpu" if everything else "gpu and sanitized"
    return [
        *(program, "--tool", tool, "--error-exitcode", str(REPORTED), only, "kns=liveweight"),
        *(*tests, "-m", marks, "-k", "not graph"),
    ]


def run(program: str, tool: str, everything: bool, seconds: float) -> int:
    """Run one tool, print its line and, where there is something, its report."""
    # Every tensor gets memory of its own, so that an access past its end is one past an allocation.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command(program, tool, everything), cwd=ROOT, env=env, text=True, timeout=seconds,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        print(f"{tool}: not finished in {seconds:.0f} s")
        return NO_TIME
    spent = f"{time.monotonic() - start:.0f} s"
    lines = done.stdout.splitlines()
    tests = next((line for line in reversed(lines) if " passed" in line), "no test passed")
    if done.returncode == 0 and "passed" in tests and "no test" not in tests:
        print(f"{tool}: clean; {tests}")
        return CLEAN
    what = "reported errors" if done.returncode == REPORTED else f"exit code {done.returncode}"
    print(f"{tool}: {what} after {spent}\n" + "\n".join(lines[-80:]))
    return FAILED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="all GPU tests of tests/csrc")
    parser.add_argument("--seconds", type=float, default=540, help="for both tools together")
    options = parser.parse_args()
    program = find()
    if program is None:
        print("compute-sanitizer not found: it comes with the CUDA toolkit; set CUDA_HOME")
        return CANNOT
    end = time.monotonic() + options.seconds
    results = []
    for left, tool in zip(range(len(TOOLS), 0, -1), TOOLS, strict=True):
        share = max(1.0, (end - time.monotonic()) / left)
        results.append(run(program, tool, options.all, share))
    return FAILED if FAILED in results else max(results)


if __name__ == "__main__":
    sys.exit(main())
