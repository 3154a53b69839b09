"""Read the machine code of the CUDA C++ kernels out of the library that nvcc built, _cuda.so.

Each code_<op>.py beside this file says what csrc/cuda/<op>.cu must have become:

    EXPECTED = [
        Expected(kernel="bitmap_kernel<Bf16", must=("HMMA", "LDGSTS.128"), blocks=2, shared=40960,
                 loop="HMMA", per_loop=4, weights=16, budget=7.8),
    ]

`python tests/kernels/cuda_code.py [PATTERN]` prints the facts of the kernels whose name matches.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import importlib
import json
import pathlib
import re
import shutil
import subprocess
import sys

from sass import (
    RESERVED_SHARED,
    all_loops,
    blocks_per_multiprocessor,
    disassemble,
    innermost,
    number_of,
    opcodes,
)

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARY = ROOT / "src" / "liveweight" / "_cuda.so"
CACHE = ROOT / "build" / "machine_code"
ARCHS = ("sm_80", "sm_90a")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What the kernels of one name must have become; instructions are named as is_a() reads them.

    kernel    regular expression, searched in the name: "column_stats<Half, 8>"
    must      instructions that must be there: "HMMA", "HMMA.SP", "LDG.128", "LDGSTS.128"
    must_not  instructions that must not; STL, LDL and atomics on floats never may
    blocks    blocks that a multiprocessor must hold at least
    shared    bytes of dynamic shared memory that the launch asks for, for the occupancy
    threads   threads of a block, where the kernel has no __launch_bounds__
    loop      an instruction that only the main loop holds, or holds most of
    per_loop  how many of them there are once around, as written; the compiler's unrolling is
              divided out by that. 0: what the compiler left counts as once around
    weights   dense weights that one thread handles once around
    budget    instructions of a thread per dense weight that the design allows, for the table
    most      instructions of a thread per dense weight that the test allows
    archs     the targets that this holds for
    """

    kernel: str
    must: tuple[str, ...] = ()
    must_not: tuple[str, ...] = ()
    blocks: int = 1
    shared: int = 0
    threads: int | None = None
    loop: str | None = None
    per_loop: int = 0
    weights: float = 0
    budget: float = 0
    most: float = 0
    archs: tuple[str, ...] = ARCHS

    def matches(self, code: Code) -> bool:
        return code.arch in self.archs and re.search(self.kernel, code.name) is not None


@dataclasses.dataclass
class Code:
    """One kernel for one target: opcodes are counted, loops are (first, last, counted opcodes)."""

    source: str  # stem of the .cu
    name: str
    arch: str
    registers: int
    spilled: int  # bytes of stack and local memory
    shared: int  # bytes, static
    threads: int | None  # of __launch_bounds__
    ops: dict[str, int]
    loops: list[tuple[int, int, dict[str, int]]]

    def instructions(self) -> int:
        return sum(self.ops.values())

    def main_loop(self, op: str) -> dict[str, int]:
        """Count the opcodes of the innermost loop that holds most of these; {} without one."""
        held = innermost(self.loops, lambda ops: number_of(ops, op) > 0)
        bodies = [ops for _, _, ops in held]
        return max(bodies, key=lambda ops: number_of(ops, op), default={})

    def blocks(self, expected: Expected) -> int:
        """Return how many blocks a multiprocessor holds at once."""
        threads = expected.threads or self.threads or 1024
        arch = int(re.search(r"\d+", self.arch)[0])
        shared = self.shared + expected.shared
        return blocks_per_multiprocessor(arch, self.registers, threads, shared)

    def per_weight(self, expected: Expected) -> float | None:
        """Return a thread's instructions per dense weight in the main loop."""
        body = self.main_loop(expected.loop) if expected.loop else {}
        if not body or not expected.weights:
            return None
        times = number_of(body, expected.loop) / expected.per_loop if expected.per_loop else 1
        return sum(body.values()) / (times * expected.weights)


def demangle(symbols: list[str]) -> list[str]:
    """Return kernels' names with their template arguments, without namespaces and parameters."""
    tool = shutil.which("c++filt")
    if tool is None:
        raise RuntimeError("c++filt is not installed (binutils): kernels' names cannot be read")
    done = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True)
    return [_bare(line) for line in done.stdout.splitlines()]


def _bare(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|liveweight::cuda::", "", name)
    name = re.sub(r"\((?:int|bool|unsigned int|long)\)", "", name).removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def _chunks(text: str) -> list[tuple[str, str, str]]:
    """Split what cuobjdump prints into (target, stem of the source, text) per embedded cubin."""
    found = []
    for chunk in re.split(r"^Fatbin elf code:\n=+\n", text, flags=re.M)[1:]:
        chunk = chunk.split("Fatbin ptx code:")[0]
        source = re.search(r"^identifier = (.*)$", chunk, re.M)
        if source:
            stem = pathlib.PurePath(source[1].strip()).stem
            found.append((re.search(r"^arch = (\S+)", chunk, re.M)[1], stem, chunk))
    return found


def _usage(library: pathlib.Path) -> dict[tuple[str, str, str], dict[str, int]]:
    """Return (target, source, symbol) -> REG, STACK, SHARED, LOCAL."""
    out = {}
    for arch, source, chunk in _chunks(disassemble(library, "-res-usage")):
        for symbol, line in re.findall(r"Function (\S+):\n\s*(.*)", chunk):
            numbers = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
            if arch.startswith("sm_9"):  # where the report counts the driver's share in
                numbers["SHARED"] = max(0, numbers["SHARED"] - RESERVED_SHARED)
            out[arch, source, symbol] = numbers
    return out


def _bounds(library: pathlib.Path) -> dict[tuple[str, str, str], int]:
    """Return (target, source, symbol) -> threads of its __launch_bounds__."""
    out = {}
    for arch, source, chunk in _chunks(disassemble(library, "-elf")):
        for part in re.split(r"^\.nv\.info\.", chunk, flags=re.M)[1:]:
            attribute = re.search(
                r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x([0-9a-f]+)",
                part.split("\n.", 1)[0],
            )
            if attribute:
                out[arch, source, part.split("\n", 1)[0].strip()] = int(attribute[1], 16)
    return out


def _read(library: pathlib.Path) -> list[Code]:
    usage, bounds, found = _usage(library), _bounds(library), []
    for arch, source, chunk in _chunks(disassemble(library, "-sass")):
        parts = re.split(r"^\s*Function : ", chunk, flags=re.M)[1:]
        symbols = [part.split("\n", 1)[0].strip() for part in parts]
        for symbol, name, sass in zip(symbols, demangle(symbols), parts, strict=True):
            used = usage[arch, source, symbol]
            loops = [(s, e, dict(collections.Counter(ops))) for s, e, ops in all_loops(sass)]
            found.append(
                Code(
                    source, name, arch, used["REG"], used["STACK"] + used["LOCAL"],
                    used["SHARED"], bounds.get((arch, source, symbol)),
                    dict(collections.Counter(opcodes(sass))), loops,
                )
            )  # fmt: skip
    return sorted(found, key=lambda code: (code.source, code.name, code.arch))


def read(library: pathlib.Path = LIBRARY) -> list[Code]:
    """Return every kernel of the library for every target; remembered by the library's content."""
    key = hashlib.sha256(library.read_bytes() + pathlib.Path(__file__).read_bytes()).hexdigest()
    remembered = CACHE / f"{key[:24]}.json"
    if not remembered.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        text = json.dumps([dataclasses.asdict(code) for code in _read(library)])
        temporary = remembered.with_suffix(f".{hashlib.sha256(text.encode()).hexdigest()[:8]}")
        temporary.write_text(text)
        temporary.replace(remembered)
    return [Code(**fields) for fields in json.loads(remembered.read_text())]


def expectations() -> dict[str, list[Expected]]:
    """Return the expectations of every code_<op>.py, by the stem of the .cu."""
    sys.path.insert(0, str(HERE))
    names = sorted(path.stem for path in HERE.glob("code_*.py"))
    return {name.removeprefix("code_"): importlib.import_module(name).EXPECTED for name in names}


def expected_of(code: Code, table: dict[str, list[Expected]]) -> Expected:
    """Return the first expectation that names the kernel, or one that asks for nothing."""
    found = (e for e in table.get(code.source, []) if e.matches(code))
    return next(found, Expected(kernel=re.escape(code.name)))


def main() -> None:
    table = expectations()
    for code in read():
        if re.search(sys.argv[1] if len(sys.argv) > 1 else "", f"{code.source} {code.name}"):
            e = expected_of(code, table)
            print(f"{code.source}: {code.name} {code.arch}: {code.registers} registers,", end=" ")
            print(f"{code.spilled} spilled, {code.shared} + {e.shared} shared,", end=" ")
            print(f"{code.blocks(e)} blocks, {code.instructions()} instructions", end="")
            per_weight = code.per_weight(e)
            print(f", {per_weight:.2f} per weight" if per_weight else "")


if __name__ == "__main__":
    main()
