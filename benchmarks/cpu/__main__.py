"""The CPU benchmark suite in one command: JSON per table, a page and plots.

    make bench-cpu                                   everything, about 25 minutes on two cores
    PYTHONPATH=benchmarks python -m cpu --quick      fewer cells, into runs/bench-cpu
    PYTHONPATH=benchmarks python -m cpu --only linear,conv
    PYTHONPATH=benchmarks python -m cpu --page-only  rebuild the page from the JSON files

Each table is written when it is done. --resume skips those of the same commit and goes on with the
whole nets where a run was stopped. Exit code: 0 all well, 1 a table failed, 2 no compiled kernels,
3 the machine is busy and --quiet was asked for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
import traceback

import torch

import liveweight as lw
from cpu import page, peers, plots, tables
from cpu.other_cases import ROOT, Absent
from cpu.timing import Settings

OUT = ROOT / "benchmarks" / "results" / "cpu"
QUICK_OUT = ROOT / "runs" / "bench-cpu"  # a quick run must not replace the recorded results
BUSY = 0.15  # cores that other programs may use before a run is called disturbed


def git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> dict[str, str]:
    """Return what a result must name: CPU, threads, versions, date and commit."""
    info = lw.info()
    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "src", "csrc", "benchmarks/*.py")
    return {
        "CPU": info.cpu["CPU"],
        "kernels": info.cpu["CPU kernels"].split(",")[0],
        "torch": torch.__version__,
        "oneDNN, MKL": _dense_versions(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "commit": commit + (" with local changes" if changed else ""),
    }


def _dense_versions() -> str:
    text = torch.__config__.show()
    found = [
        re.search(form, text) for form in (r"MKL-DNN v([\d.]+)", r"Kernel Library Version (\S+)")
    ]
    return ", ".join(match[1] if match else "unknown" for match in found)


def measure_peaks() -> dict[int, float]:
    """Return GF/s of register multiply-adds on one thread and, given two cores, on two."""
    counts = [1, 2] if (os.cpu_count() or 1) > 1 else [1]
    before, found = torch.get_num_threads(), {}
    for threads in counts:
        torch.set_num_threads(threads)
        found[threads] = torch.ops.liveweight.cpu_peak(threads, 0.2)
    torch.set_num_threads(before)
    return found


def cores_in_use(seconds: float = 0.3) -> float:
    """Return how many cores other programs keep busy while this one sleeps (0: no figure)."""

    def ticks() -> int:
        try:
            fields = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return 0
        values = [int(field) for field in fields]
        return sum(values) - values[3] - values[4]  # neither idle nor waiting for a disk

    before = ticks()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def run_table(table: tables.Table, options, stamp: dict, known: list[dict]) -> dict:
    """Measure a table; what fails ends this table alone, with the reason in its result."""
    peaks = measure_peaks()
    seconds = table.seconds or 0.5
    settings = Settings(options.quick, seconds * options.effort, peaks=peaks, known=tuple(known))
    result: dict = {"machine": stamp, "quick": options.quick, "effort": options.effort}
    result |= {"threads": table.threads, "peak_gflops": peaks, "rows": [], "problems": []}
    result["cores_in_use_by_others"] = round(cores_in_use(), 2)
    result["failed"] = False
    start = time.monotonic()
    torch.manual_seed(0)
    torch.set_num_threads(table.threads)
    try:
        if table.threads > (os.cpu_count() or 1):
            raise Absent(f"{table.threads} threads need as many cores")
        for row in table.rows(settings):
            if "failed" in row:
                labels = {k: v for k, v in row.items() if k != "failed"}
                result["problems"].append(f"{labels}: {row['failed']}")
                result["failed"] = True
                continue
            result["rows"].append(row)
            print(f"  {table.name}: {_line(row)}", flush=True)
            if time.monotonic() - start > table.limit_s * max(1.0, options.effort):
                result["problems"].append(f"stopped after {time.monotonic() - start:.0f} s")
                break
    except Absent as reason:
        result["problems"].append(str(reason))
    except Exception as error:  # one broken table must not cost the others' results
        traceback.print_exc()
        result["problems"].append(f"{type(error).__name__}: {error}")
        result["failed"] = True
    result["seconds"] = time.monotonic() - start
    return result


def _line(row: dict) -> str:
    shown = {k: v for k, v in row.items() if isinstance(v, (str, int, float)) and k != "busy"}
    return " ".join(
        f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()
    )


def load(out: pathlib.Path) -> dict[str, dict]:
    """Return the results that lie in a folder, in the tables' order."""
    files = {name: out / f"{name}.json" for name in tables.TABLES}
    return {n: json.loads(f.read_text()) for n, f in files.items() if f.exists()}


def write_page(out: pathlib.Path) -> pathlib.Path:
    """Rebuild plots and page from the JSON files."""
    results, other = load(out), peers.load(out)
    drawn = plots.draw(results, out)
    target = out / "README.md"
    target.write_text(page.page(results, other, drawn))
    return target


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, help=f"default: {OUT.relative_to(ROOT)}")
    parser.add_argument("--only", help="tables whose names start with these words, by comma")
    parser.add_argument("--quick", action="store_true", help="fewer cells")
    parser.add_argument("--effort", type=float, default=1.0, help="factor on the time per cell")
    parser.add_argument("--data", type=pathlib.Path, help="folder of shared data (DLMC)")
    parser.add_argument("--resume", action="store_true", help="skip tables of the same commit")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--quiet", action="store_true", help="refuse on a busy machine")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    options.out = options.out or (QUICK_OUT if options.quick else OUT)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.data:
        os.environ["LIVEWEIGHT_DATA"] = str(options.data)
    if options.page_only:
        print(write_page(options.out))
        return 0
    if lw.info().parts["cpu"] != "loaded":
        print(f"the compiled CPU kernels are missing: {lw.info().parts['cpu']}")
        return 2
    if cores_in_use() > BUSY:
        print(f"other programs keep {cores_in_use():.1f} cores busy: times will be disturbed")
        if options.quiet:
            return 3
    stamp, before, failed = machine(), load(options.out), []
    for table in tables.chosen(options.only):
        done = before.get(table.name)
        same = options.resume and done and done["machine"]["commit"] == stamp["commit"]
        same = same and done["quick"] == options.quick and done["effort"] == options.effort
        if same and not done["problems"]:
            continue
        result = run_table(table, options, stamp, done["rows"] if same else [])
        failed += [table.name] if result.pop("failed") else []
        (options.out / f"{table.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{table.name}: {len(result['rows'])} rows, {result['seconds']:.0f} s", flush=True)
    print(write_page(options.out))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
