"""Compile the CUDA C++ kernels with nvcc for named GPUs without one, and read the machine code."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import tempfile

from machine_code import Facts, blocks_per_multiprocessor, count, disassemble, opcodes

ROOT = pathlib.Path(__file__).resolve().parents[2]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")


def readable(symbol: str) -> tuple[str, str]:
    """Split a mangled kernel name into the kernel and its template arguments."""
    name = re.search(r"\d((?:column|run|combine)_stats)", symbol)
    dtype = {"f": "fp32", "NS0_4Bf16E": "bf16", "NS0_4HalfE": "fp16"}
    arguments = re.search(r"_statsI(f|NS0_4(?:Bf16|Half)E)Li(\d)E(?:Lb([01])E)?", symbol)
    if arguments is None:
        return f"activity_stats_, {name[1]}", ""
    aligned = {"0": ", unaligned", "1": ", aligned", None: ""}[arguments[3]]
    return f"activity_stats_, {name[1]}", f"{dtype[arguments[1]]} x {arguments[2]}{aligned}"


def _compile(nvcc: str, arch: str) -> tuple[str, dict[str, list[str]]]:
    """Return nvcc's report, and the opcodes of every kernel by its mangled name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernels.cubin"
        done = subprocess.run(
            [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin", "-Xptxas=-v"]
            + [f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{ROOT / 'csrc' / 'cuda'}"]
            + [str(ROOT / "tests" / "cuda_host" / "all_kernels.cu"), "-o", str(cubin)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"nvcc failed for sm_{arch}:\n{done.stderr}")
        parts = disassemble(cubin, "-sass").split("Function : ")[1:]
    return done.stderr, {part.split("\n", 1)[0].strip(): opcodes(part) for part in parts}


def cuda_facts(nvcc: str) -> list[Facts]:
    """Compile csrc/cuda for sm_80 and sm_90a and report every kernel."""
    facts = []
    for arch in ("80", "90a"):
        report, bodies = _compile(nvcc, arch)
        for entry in re.split(r"Compiling entry function '", report)[1:]:
            symbol = entry.split("'", 1)[0]
            spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", entry)
            shared = re.search(r"(\d+) bytes smem", entry)
            ops = bodies[symbol]
            kernel, variant = readable(symbol)
            registers = int(re.search(r"Used (\d+) reg", entry)[1])
            shared_bytes = int(shared[1]) if shared else 0
            threads = 512 if "combine" in kernel else 256
            sizes = (sum(map(int, spills)), shared_bytes, threads, len(ops))
            facts.append(Facts(kernel, variant, f"sm_{arch}", registers, *sizes, count(ops)))
            held = (int(arch[:2]), registers, threads, shared_bytes)
            facts[-1].blocks = blocks_per_multiprocessor(*held)
    return sorted(facts, key=lambda f: (f.kernel, f.variant, f.arch))
