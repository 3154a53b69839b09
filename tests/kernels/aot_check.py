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
import shutil
import subprocess
import sys
from collections.abc import Iterator

os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import cuda_code  # noqa: E402
from machine_code import Case, Facts, facts_of  # noqa: E402
from sass import count  # noqa: E402

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


def cuda_facts() -> list[tuple[Facts, cuda_code.Code, cuda_code.Expected]]:
    """Return the facts of every kernel of _cuda.so; none where it was not built."""
    if not cuda_code.LIBRARY.exists():
        return []
    table, found = cuda_code.expectations(), []
    for code in cuda_code.read():
        e = cuda_code.expected_of(code, table)
        kernel, _, arguments = code.name.partition("<")
        sizes = (code.spilled, code.shared + e.shared, e.threads or code.threads or 0)
        loop = code.main_loop(e.loop) if e.loop else {}
        facts = Facts(
            f"{code.source}, {kernel}", arguments.removesuffix(">"), code.arch, code.registers,
            *sizes, code.instructions(), count(code.ops),
            [{"all": sum(loop.values()), **count(loop)}] if loop else [], code.blocks(e),
        )  # fmt: skip
        found.append((facts, code, e))
    return found


def weights_table(rows: list[tuple[Facts, cuda_code.Code, cuda_code.Expected]]) -> list[str]:
    """Return the lines of the table of instructions per dense weight."""
    lines = [
        "## Instructions per dense weight",
        "",
        "CUDA C++ kernels that decode weights: instructions of the main loop once around, dense",
        "weights that one thread handles in it, their quotient, and what the design allows. While",
        "an H200's memory delivers one dense weight's share of a bitmap matrix, its arithmetic",
        "units take 7.8, 5.0 or 2.2 instructions of a thread at 50, 70 or 90 % sparsity.",
        "",
        "| kernel | variant | target | once around | dense weights | per weight | budget |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for facts, code, e in rows:
        per_weight = code.per_weight(e)
        if per_weight is not None:
            once = facts.loops[0]["all"]
            cells = (once, f"{once / per_weight:.0f}", f"{per_weight:.2f}", e.budget or "-")
            name = f"{facts.kernel} | {facts.variant} | {facts.arch}"
            lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def _cells(f: Facts) -> Iterator[object]:
    def named(names: tuple[str, ...]) -> str:
        return ", ".join(f"{f.counts[n]} {n}" for n in names if n in f.counts) or "-"

    yield from (f.kernel, f.variant, f.arch, f.threads, f.registers, f.spilled, f.shared_bytes)
    yield f.blocks
    yield f"{f.flops_per_byte:.0f}" if f.flops_per_byte else "-"
    yield named(("HGMMA", "HMMA", "HMMA.SP"))
    yield ", ".join(str(loop["all"]) for loop in f.loops) or "-"
    yield named(("LDG.128", "LDGSTS.128", "UTMALDG"))
    yield f.instructions


def markdown(facts: list[Facts], weights: list[str]) -> str:
    version = "nvcc not found"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")
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
        "Shared: bytes per block, dynamic ones too. Blocks: how many a multiprocessor holds at",
        "once, by registers, threads and shared memory. FLOP/byte: arithmetic of a step over what",
        "it reads from global memory (an H200's tensor cores need 184 in bf16 where the L2 cache",
        "holds nothing of it). Tensor core: HGMMA (sm_90) or HMMA instructions, HMMA.SP those on",
        "2:4 weights. Step: instructions of each main loop, as the compiler unrolled it. Wide:",
        "16-byte loads, LDG.128, asynchronous copies to shared memory, LDGSTS.128, and tensor",
        "descriptor loads, UTMALDG.",
        "",
        f"| {columns} |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += ["| " + " | ".join(map(str, _cells(f))) + " |" for f in facts]
    return "\n".join([*lines, "", *weights])


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
    cuda = cuda_facts() if options.only in (None, "cuda") else []
    facts += [one for one, _, _ in cuda]
    for one in facts:
        print(json.dumps(dataclasses.asdict(one)))
    if options.markdown:
        if options.only:
            parser.error("--markdown writes the whole table: leave out --only")
        OUT.write_text(markdown(facts, weights_table(cuda)))


if __name__ == "__main__":
    main()
