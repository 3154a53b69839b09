"""Compile the GPU kernels for named targets without a GPU and read what the compiler made of them.

    python tests/kernels/aot_check.py             # one JSON object per kernel and target
    python tests/kernels/aot_check.py --markdown  # and benchmarks/results/gpu-machine-code.md
    python tests/kernels/aot_check.py --only masked_linear

Every aot_<op>.py beside this file lists the cases of one op, for every row of its table:

    def cases(arch: int) -> Iterator[Case]

Cases that would compile to the same code compile once; two processes share them. Must not run under
TRITON_INTERPRET, so tests start it as a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from cuda_code import cuda_facts, find_nvcc  # noqa: E402
from machine_code import Case, Facts, facts_of  # noqa: E402

ARCHS = (80, 86, 89, 90)
PROCESSES = 2
OUT = HERE.parents[1] / "benchmarks" / "results" / "gpu-machine-code.md"


def all_cases(only: str | None) -> list[Case]:
    """Return the cases of every op, or of those whose file is named aot_<only>, each code once."""
    found: dict[tuple, Case] = {}
    for path in sorted(HERE.glob("aot_*.py")):
        if path.stem == "aot_check" or only not in (None, path.stem.removeprefix("aot_")):
            continue
        module = importlib.import_module(path.stem)
        for arch in ARCHS:
            for case in module.cases(arch):
                found.setdefault(case.key(), case)
    return list(found.values())


def compile_part(only: str | None, part: int) -> None:
    """Compile every PROCESSES-th case and print its facts with its number."""
    for number, case in list(enumerate(all_cases(only)))[part::PROCESSES]:
        print(number, json.dumps(dataclasses.asdict(facts_of(case))), flush=True)


def triton_facts(only: str | None) -> list[Facts]:
    """Compile all cases in processes of their own; facts come in the order of the cases."""
    command = [sys.executable, str(HERE / "aot_check.py")]
    command += ["--only", only] if only else []
    running = [
        subprocess.Popen([*command, "--part", str(part)], stdout=subprocess.PIPE, text=True)
        for part in range(PROCESSES)
    ]
    lines = [line for process in running for line in process.communicate()[0].splitlines()]
    if any(process.returncode for process in running):
        raise RuntimeError("a compile failed; its process said which above")
    numbered = [(int(number), text) for number, text in (line.split(" ", 1) for line in lines)]
    return [Facts(**json.loads(text)) for _, text in sorted(numbered)]


def _cells(f: Facts) -> Iterator[object]:
    def named(names: tuple[str, ...]) -> str:
        return ", ".join(f"{f.counts[n]} {n}" for n in names if n in f.counts) or "-"

    yield from (f.kernel, f.variant, f.arch, f.threads, f.registers, f.spilled, f.shared_bytes)
    yield f.blocks
    yield f"{f.flops_per_byte:.0f}" if f.flops_per_byte else "-"
    yield named(("HGMMA", "HMMA"))
    yield ", ".join(str(loop["all"]) for loop in f.loops) or "-"
    yield named(("LDG.128", "LDGSTS.128", "UTMALDG"))
    yield f.instructions


def markdown(facts: list[Facts], nvcc: str | None) -> str:
    version = "nvcc not found"
    if nvcc:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        version = "nvcc " + re.search(r"V([\d.]+)", text)[1]
    columns = (
        "kernel | variant | target | threads | registers | spilled | shared | blocks"
        " | FLOP/byte | tensor core | step | wide | instructions"
    )
    lines = [
        "# Machine code of the GPU kernels",
        "",
        "Compiler output, not a measurement: nothing here ran on a GPU, and nothing here is a",
        "speed. Written by `python tests/kernels/aot_check.py --markdown`; Triton "
        f"{triton.__version__}, {version}, {datetime.date.today().isoformat()}.",
        "",
        "Tiles in variants are tokens x features x step. Spilled: bytes of stack and local memory.",
        "Shared: bytes per block. Blocks: how many a multiprocessor holds at once, by registers,",
        "threads and shared memory. FLOP/byte: arithmetic of a step over what it reads from global",
        "memory (an H200's tensor cores need 184 in bf16 if nothing is found in the L2 cache).",
        "Tensor core: HGMMA (sm_90) or HMMA instructions. Step: instructions of each main loop, as",
        "the compiler unrolled it. Wide: 16-byte loads, LDG.128, asynchronous copies to shared",
        "memory, LDGSTS.128, and tensor descriptor loads, UTMALDG.",
        "",
        f"| {columns} |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += ["| " + " | ".join(map(str, _cells(f))) + " |" for f in facts]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="write the results table too")
    parser.add_argument("--only", help="triton, cuda, or an op that has a file of cases")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    only = None if options.only == "triton" else options.only
    if options.part is not None:
        return compile_part(only, options.part)
    facts = triton_facts(only) if only != "cuda" else []
    nvcc = find_nvcc()
    if nvcc and options.only in (None, "cuda"):
        facts += cuda_facts(nvcc)
    for one in facts:
        print(json.dumps(dataclasses.asdict(one)))
    if options.markdown:
        if options.only:
            parser.error("--markdown writes the whole table: leave out --only")
        OUT.write_text(markdown(facts, nvcc))


if __name__ == "__main__":
    main()
