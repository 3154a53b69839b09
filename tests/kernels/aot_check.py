"""Compile the GPU kernels for named targets without a GPU and read what the compiler made of them.

    python tests/kernels/aot_check.py             # one JSON object per kernel and target
    python tests/kernels/aot_check.py --markdown  # and benchmarks/results/gpu-machine-code.md

Triton kernels go through triton.compile with what the JIT would specialise on (pointers and row
lengths that are multiples of 16, compile-time constants); CUDA C++ through nvcc. Registers, spills
and shared memory are the compiler's report; instructions are counted in the disassembly (cuobjdump
comes with Triton). Must not run under TRITON_INTERPRET, so tests start it as its own process.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from liveweight.kernels import masked_linear  # noqa: E402
from liveweight.kernels.tiles import Tile, listed_tiles  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHS = (80, 90)
ITEM = {"bf16": 2, "fp32": 4}
COUNTED = ("HGMMA", "HMMA", "FFMA", "LDGSTS", "LDG.128", "LDG", "STL", "LDL", "ATOM", "RED")


@dataclasses.dataclass
class Facts:
    """What the compiler made of one kernel for one target."""

    kernel: str
    variant: str
    arch: str
    registers: int
    spilled: int  # bytes of local memory and stack
    shared_bytes: int
    threads: int
    instructions: int
    counts: dict[str, int]


def disassemble(cubin: pathlib.Path, *options: str) -> str:
    env = dict(os.environ, PATH=f"{TOOLS}{os.pathsep}{os.environ['PATH']}")
    command = [str(TOOLS / "cuobjdump"), *options, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout


def opcodes(sass: str) -> list[str]:
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M)


def count(ops: list[str]) -> dict[str, int]:
    """Count instructions by name; LDG.128 are the 16-byte ones among the LDG."""
    names = collections.Counter(op.split(".")[0] for op in ops)
    names["LDG.128"] = sum(op.startswith("LDG.") and ".128" in op for op in ops)
    names["ATOM"] = sum(op.startswith("ATOM") for op in ops)
    return {name: names[name] for name in COUNTED if names[name]}


def compile_triton(
    function, signature: dict[str, str], constants: dict, arch: int, warps: int, stages: int
):
    """Compile as the JIT does for arguments that are multiples of 16."""
    names = function.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*") or name in ("N", "K", "words")
        },
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def triton_facts(kernel: str, variant: str, arch: int, compiled, warps: int) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", disassemble(cubin, "-res-usage"))}
        ops = opcodes(disassemble(cubin, "-sass"))
    return Facts(
        kernel, variant, f"sm_{arch}", usage["REG"], usage["STACK"] + usage["LOCAL"],
        compiled.metadata.shared, 32 * warps, len(ops), count(ops),
    )  # fmt: skip


def masked_linear_facts(dtype: str, tile: Tile, even_k: bool, arch: int) -> Facts:
    pointer = {"x": dtype, "weight": dtype, "bias": dtype, "y": dtype}
    pointer |= {"mask_bits": "i32", "blocks": "i32", "counts": "i32"}
    signature = {f"{name}_ptr": f"*{kind}" for name, kind in pointer.items()}
    signature |= dict.fromkeys(("M", "N", "K", "words", "k_blocks"), "i32")
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    constants = {
        "HAS_BIAS": True, "EVEN_K": even_k, "PRECISION": masked_linear.precision(torch_dtype),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": 8,
    }  # fmt: skip
    function = masked_linear.masked_linear_kernel
    compiled = compile_triton(function, signature, constants, arch, tile.warps, tile.stages)
    ragged = "" if even_k else ", ragged K"
    variant = f"{dtype}, {tile.m}x{tile.n}x{tile.k}{ragged}"
    return triton_facts("masked_linear", variant, arch, compiled, tile.warps)


def list_blocks_facts(tile: Tile, arch: int) -> Facts:
    pointers = ("mask_bits", "blocks", "counts")
    signature = {f"{name}_ptr": "*i32" for name in pointers}
    signature |= dict.fromkeys(("N", "words", "k_blocks"), "i32")
    constants = {"BLOCK_N": tile.n, "WORDS": tile.k // 32, "STEP": 64}
    function = masked_linear.list_blocks_kernel
    compiled = compile_triton(function, signature, constants, arch, 4, 3)
    return triton_facts("masked_linear, block list", f"{tile.n}x{tile.k}", arch, compiled, 4)


def triton_cases() -> list[Facts]:
    facts = []
    for arch in ARCHS:
        for dtype in ("bf16", "fp32"):  # float16 compiles to the same code with other type names
            for tile in listed_tiles("masked_linear", arch, ITEM[dtype]):
                for even_k in (True, False) if dtype == "bf16" else (True,):
                    facts.append(masked_linear_facts(dtype, tile, even_k, arch))
        facts.append(list_blocks_facts(listed_tiles("masked_linear", arch, 2)[-1], arch))
    return facts


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


def cuda_cases(nvcc: str) -> list[Facts]:
    """Compile csrc/cuda for sm_80 and sm_90a and read the report and the machine code."""
    facts = []
    for arch in ("80", "90a"):
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
        bodies = {part.split("\n", 1)[0].strip(): opcodes(part) for part in parts}
        for entry in re.split(r"Compiling entry function '", done.stderr)[1:]:
            symbol = entry.split("'", 1)[0]
            spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", entry)
            shared = re.search(r"(\d+) bytes smem", entry)
            ops = bodies[symbol]
            kernel, variant = readable(symbol)
            registers = int(re.search(r"Used (\d+) reg", entry)[1])
            threads = 512 if "combine" in kernel else 256
            sizes = (sum(map(int, spills)), int(shared[1]) if shared else 0, threads, len(ops))
            facts.append(Facts(kernel, variant, f"sm_{arch}", registers, *sizes, count(ops)))
    return sorted(facts, key=lambda f: (f.kernel, f.variant, f.arch))


def markdown(facts: list[Facts], nvcc: str | None) -> str:
    version = "nvcc not found"
    if nvcc:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        version = "nvcc " + re.search(r"V([\d.]+)", text)[1]
    today = datetime.date.today().isoformat()
    columns = "kernel variant target threads registers spilled shared tensor-core wide instructions"
    lines = [
        "# Machine code of the GPU kernels",
        "",
        "Compiler output, not a measurement: nothing here ran on a GPU, and nothing here is a",
        "speed. Written by `python tests/kernels/aot_check.py --markdown`;"
        f" Triton {triton.__version__}, {version}, {today}.",
        "",
        "Spilled: bytes of stack and local memory. Shared: bytes per block. Tensor core: HGMMA",
        "(sm_90) or HMMA instructions. Wide: 16-byte loads, LDG.128, and asynchronous copies to",
        "shared memory, LDGSTS.",
        "",
        "| " + columns.replace(" ", " | ") + " |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for f in facts:
        tensor = ", ".join(f"{f.counts[n]} {n}" for n in ("HGMMA", "HMMA") if n in f.counts)
        wide = ", ".join(f"{f.counts[n]} {n}" for n in ("LDG.128", "LDGSTS") if n in f.counts)
        cells = (f.kernel, f.variant, f.arch, f.threads, f.registers, f.spilled, f.shared_bytes)
        row = (*cells, tensor or "-", wide or "-", f.instructions)
        lines.append("| " + " | ".join(str(cell) for cell in row) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="write the results table too")
    parser.add_argument("--only", choices=("triton", "cuda"), help="one of the two languages")
    options = parser.parse_args()
    nvcc = find_nvcc()
    facts = triton_cases() if options.only != "cuda" else []
    if options.only != "triton" and nvcc:
        facts += cuda_cases(nvcc)
    for one in facts:
        print(json.dumps(dataclasses.asdict(one)))
    if options.markdown:
        table = markdown(facts, nvcc)
        out = ROOT / "benchmarks" / "results" / "gpu-machine-code.md"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(table)
        print(table, file=sys.stderr)


if __name__ == "__main__":
    main()
