"""Everything that needs a GPU, in one command: build check, tests, benchmarks, results as files.

    python benchmarks/gpu.py --out benchmarks/results/gpu

Needs a CUDA device, torch with CUDA, Triton, pytest and the installed package; no network. Writes
gpu.json, gpu.md and tests.txt. Takes a few minutes; benchmarks that do not fit into --budget
seconds are listed as not run. Exit code: 0 all well, 1 something failed, 2 no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
import traceback

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
SERVED = {"activity_stats_": "cuda c++", "masked_linear": "triton"}


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def machine() -> dict[str, str]:
    """Return what a result must name: GPU, driver, versions, date and commit."""
    import triton

    device = torch.cuda.get_device_properties(0)
    commit = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    driver = _output(*query).splitlines() or ["unknown"]
    nvcc = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return {
        "gpu": f"{device.name}, sm_{device.major}{device.minor}, "
        f"{device.multi_processor_count} multiprocessors, L2 {device.L2_cache_size >> 20} MiB",
        "driver, largest clock": driver[0],
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "triton": triton.__version__,
        "nvcc": (_output(nvcc, "--version").splitlines() or ["unknown"])[-1],
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "commit": commit + (" with local changes" if changed not in ("", "unknown") else ""),
    }


def build_problems() -> list[str]:
    """Return what keeps an op from its GPU kernel; empty where all is built and loaded."""
    from liveweight import _library, ops  # noqa: F401

    served = {op: devices["cuda"] for op, devices in _library.backends().items()}
    return [
        f"{op} is served by {served[op]}, expected {kind} ({_library.status()})"
        for op, kind in SERVED.items()
        if served[op] != kind
    ]


def gpu_tests() -> list[str]:
    """Return the pytest arguments: every file with GPU tests, and Triton's values natively."""
    marked = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text()
    ]
    native = ["tests/kernels/test_masked_linear.py"]
    return list(dict.fromkeys(str(ROOT / name) for name in [*marked, *native]))


def run_tests(out: pathlib.Path, limit_s: float) -> dict[str, object]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "gpu or test_masked_linear", *gpu_tests()]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
        text, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as expired:
        text, code = f"{expired.stdout or ''}\nstopped after {limit_s:.0f} s", -1
    (out / "tests.txt").write_text(text.replace(str(ROOT), "."))
    lines = text.strip().splitlines() or ["no output"]
    return {"passed": code == 0, "summary": lines[-1], "seconds": time.monotonic() - start}


def run_benchmarks(deadline: float) -> tuple[dict[str, list[dict]], list[str]]:
    """Return rows by group, and what failed or did not fit."""
    import gpu_cases

    results: dict[str, list[dict]] = {}
    missing: list[str] = []
    with torch.inference_mode():
        for group, cases in gpu_cases.GROUPS.items():
            results[group] = []
            try:
                for rows in cases():
                    results[group] += [dataclasses.asdict(row) for row in rows]
                    print(f"{group}: {rows[0].case}: {rows[0].median_us:.1f} us", flush=True)
                    torch.cuda.empty_cache()
                    if time.monotonic() > deadline:
                        missing.append(f"{group} and later: not run after {rows[0].case}, no time")
                        return results, missing
            except Exception as error:  # one broken group must not cost the others' results
                traceback.print_exc()
                missing.append(f"{group}: {type(error).__name__}: {error}")
    return results, missing


def markdown(result: dict) -> str:
    """Return the results as a page; times are medians of one call."""
    lines = ["# GPU results", ""]
    lines += [f"* {key}: {value}" for key, value in result["machine"].items()]
    lines += [f"* tests: {result['tests']['summary']}"]
    lines += [f"* problem: {text}" for text in result["problems"]]
    lines += [
        "",
        "Times are medians (quartiles) in microseconds of one call inside a CUDA graph, inputs",
        "rotated through several times the L2 cache, the calls replayed in turns. Ratio: time of",
        "the baseline over this one's; **below 1 is a loss**.",
    ]
    for group, rows in result["benchmarks"].items():
        lines += ["", f"## {group}", "", "| case | call | us | ratio | to | note |"]
        lines += ["|---|---|--:|--:|---|---|"]
        for r in rows:
            ratio = f"{r['ratio']:.2f}" if r["ratio"] >= 0.995 else f"**{r['ratio']:.2f}**"
            span = f"{r['median_us']:.1f} ({r['low_us']:.1f} to {r['high_us']:.1f})"
            cells = (r["case"], r["call"], span, ratio, r["baseline"], r["note"])
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all of it")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device that torch can use: nothing was run, nothing was written")
        return 2
    deadline = time.monotonic() + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict = {"machine": machine(), "problems": build_problems()}
    if not result["problems"]:
        result["tests"] = run_tests(options.out, options.budget / 2)
        result["benchmarks"], missing = run_benchmarks(deadline)
        result["problems"] += missing
    else:
        result |= {"tests": {"passed": False, "summary": "not run"}, "benchmarks": {}}
    (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "gpu.md").write_text(markdown(result))
    print(markdown(result))
    return 0 if result["tests"]["passed"] and not result["problems"] else 1


if __name__ == "__main__":
    sys.exit(main())
