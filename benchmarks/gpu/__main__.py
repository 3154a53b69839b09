"""Everything that needs a GPU, in one command: build check, tests, benchmarks, results as files.

    PYTHONPATH=benchmarks python -m gpu --out benchmarks/results/gpu

Needs a CUDA device, torch with CUDA, Triton, pytest and the installed package; no network. Writes
gpu.json, README.md, plots, tests.txt and sanitizers.txt. Benchmarks that do not fit into --budget
seconds are listed as not run. Exit code: 0 all well, 1 something failed, 2 no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import time
import traceback

import torch

from gpu import (
    block_cases,
    kernelwise_cases,
    masked_cases,
    net_cases,
    nm_cases,
    other_cases,
    plots,
    score_cases,
    unstructured_cases,
)
from gpu.machine import ROOT, build_problems, machine
from gpu.page import markdown

# In the order of what a short budget should still see; whole nets wait longest for the compiler.
GROUPS = {
    "peak": other_cases.peak_cases,
    "unstructured_linear": unstructured_cases.cases,
    "semi-structured": nm_cases.cases,
    "selection": score_cases.selection_cases,
    "conv scores": score_cases.conv_cases,
    "kernelwise_conv2d": kernelwise_cases.cases,
    "masked_linear": masked_cases.forward_cases,
    "training step": net_cases.training_cases,
    "block_linear": block_cases.linear_cases,
    "block_conv2d": block_cases.conv_cases,
    "masked_linear backward": masked_cases.backward_cases,
    "activity_stats_": other_cases.activity_cases,
    "small calls": other_cases.small_cases,
    "nets": net_cases.compress_cases,
}
EAGER = {"small calls"}
# A group may take so many times its even share of what is left: most groups take less.
GENEROUS = 2.0
# Files whose tests run natively where there is a GPU, marked or not, but for those that need none.
NATIVE = ("tests/kernels/test_*.py", "tests/csrc/test_cuda_*.py")
NEEDLESS = {"test_aot.py", "test_jit.py", "test_tiles.py", "test_cuda_machine_code.py"}
# Seconds for compute-sanitizer's memcheck and racecheck over the CUDA C++ kernels.
SANITIZE_S = 60
# Of the seconds for everything, at most so much for the tests.
TESTS_SHARE = 0.4
# Tests mostly wait for the compiler.
TEST_PROCESSES = 6


def gpu_tests() -> list[str]:
    """Return every file with GPU tests, and those that check Triton's values natively."""
    marked = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text()
    ]
    native = [p for glob in NATIVE for p in sorted(ROOT.glob(glob)) if p.name not in NEEDLESS]
    return list(dict.fromkeys(map(str, [*marked, *native])))


def run_tests(out: pathlib.Path, limit_s: float) -> dict[str, object]:
    """Run the tests that a GPU changes; write their output to tests.txt."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(TEST_PROCESSES)]
    command += ["-k", "(gpu or kernels) and not emulated", *gpu_tests()]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
        text, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        text = output.decode() if isinstance(output, bytes) else output
        text, code = f"{text}\nstopped after {limit_s:.0f} s", -1
    (out / "tests.txt").write_text(text.replace(str(ROOT), "."))
    lines = text.strip().splitlines() or ["no output"]
    return {"passed": code == 0, "summary": lines[-1], "seconds": time.monotonic() - start}


def run_sanitizers(out: pathlib.Path, limit_s: float) -> str:
    """Run memcheck and racecheck over the CUDA C++ kernels; write and return what they say."""
    program = str(ROOT / "tests" / "cuda_host" / "compute_sanitizer.py")
    command = [sys.executable, program, "--seconds", f"{limit_s:.0f}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    text = (done.stdout + done.stderr).replace(str(ROOT), ".")
    (out / "sanitizers.txt").write_text(text)
    words = {0: "clean", 1: "REPORTED ERRORS", 2: "could not run", 3: "not finished in time"}
    lines = text.strip().splitlines() or ["no output"]
    return f"{words.get(done.returncode, 'failed')} ({lines[0]})"


def run_benchmarks(deadline: float, only: set[str]) -> tuple[list[dict], list[str]]:
    """Return rows, and what failed or did not fit.

    What is left of the time is shared out evenly before each group, so that none goes unseen.
    """
    rows: list[dict] = []
    missing: list[str] = []
    wanted = [group for group in GROUPS if not only or group in only]
    for i, group in enumerate(wanted):
        start = time.monotonic()
        end = start + GENEROUS * (deadline - start) / (len(wanted) - i)
        try:
            for case in GROUPS[group]():
                found = case.measure(eager=group in EAGER)
                rows += [dataclasses.asdict(row) for row in found]
                print(f"{group}: {case.name}: {found[0].ratio:.2f}x dense", flush=True)
                torch.cuda.empty_cache()
                if time.monotonic() > min(end, deadline):
                    missing.append(f"{group}: cut after {case.name}, no time")
                    break
        except Exception as error:  # one broken group must not cost the others' results
            traceback.print_exc()
            missing.append(f"{group}: {type(error).__name__}: {error}")
    return rows, missing


def write_page(result: dict, out: pathlib.Path) -> None:
    """Write the plots and the page of a result."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(result["rows"], out)
    (out / "README.md").write_text(markdown(result | {"plots": drawn}))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--budget", type=float, default=510, help="seconds for all of it")
    parser.add_argument("--only", default="", help="names of groups, with commas")
    parser.add_argument("--page-only", action="store_true", help="write the page of what is there")
    options = parser.parse_args(arguments)
    if options.page_only:
        found = options.out / "gpu.json"
        write_page(json.loads(found.read_text()) if found.exists() else {"rows": []}, options.out)
        return 0
    only = {name.strip() for name in options.only.split(",") if name.strip()}
    if only - set(GROUPS):
        parser.error(f"--only: no group {sorted(only - set(GROUPS))}; there are {list(GROUPS)}")
    if not torch.cuda.is_available():
        print("no CUDA device that torch can use: nothing was run, nothing was written")
        return 2
    deadline = time.monotonic() + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict = {"machine": machine(), "problems": build_problems(), "rows": []}
    result["tests"] = {"passed": False, "summary": "not run"}
    if not result["problems"]:
        result["tests"] = run_tests(options.out, options.budget * TESTS_SHARE)
        result["sanitizers"] = run_sanitizers(options.out, SANITIZE_S)
        result["rows"], missing = run_benchmarks(deadline, only)
        if "ERRORS" in result["sanitizers"]:
            missing.append(f"sanitizers: {result['sanitizers']}")
        result["problems"] += missing
    (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    write_page(result, options.out)
    print(markdown(result))
    return 0 if result["tests"]["passed"] and not result["problems"] else 1


if __name__ == "__main__":
    sys.exit(main())
