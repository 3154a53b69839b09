"""Compile one Triton kernel for a named GPU without one, and read what the compiler made of it.

A case says what the JIT would have specialised on: types, compile-time constants, which numbers
are multiples of 16. Registers, spills and shared memory are the compiler's report; instructions are
counted in the disassembly (cuobjdump comes with Triton).
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from liveweight.kernels.tiles import Tile

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = (
    "HGMMA", "HMMA", "FFMA", "UTMALDG", "UTMASTG", "LDGSTS.128", "LDGSTS", "LDG.128", "LDG",
    "STL", "LDL", "ATOM", "RED",
)  # fmt: skip
# Per architecture: threads, blocks and bytes of shared memory that a multiprocessor holds.
RESIDENT = {
    80: (2048, 32, 164 << 10),
    86: (1536, 16, 100 << 10),
    89: (1536, 24, 100 << 10),
    90: (2048, 32, 228 << 10),
}
RESERVED_SHARED = 1 << 10  # bytes that the driver takes of every block's shared memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel, specialised as for one call.

    op           row group of the table, by convention the key of tile_table.py
    variant      what sets this case apart: dtype, tile, ragged sizes
    function     the @triton.jit function
    arch         compute capability, 80 for 8.0
    signature    type of every argument that is not a constant: "*bf16", "i32",
                 "tensordesc<bf16[128, 64]>"
    constants    value of every constexpr argument (None for an absent pointer, too)
    tile         its warps and stages are the compiler's options
    multiples    integer arguments that are multiples of 16; pointers always are
    matrix_rows  rows of the tensor-core product, 0 for a kernel without one: sm_90 has its own
                 instruction from 64 rows on
    wide         16-byte loads (LDG.128, LDGSTS.128) that must be there at least
    copies       those among them that every main loop must hold: fewer, and an operand comes some
                 other way, which the compiler does not overlap with products
    flops, bytes work and global memory traffic of one step of the main loop, 0 where there is none
    """

    op: str
    variant: str
    function: Any
    arch: int
    signature: dict[str, str]
    constants: dict[str, Any]
    tile: Tile
    multiples: tuple[str, ...] = ()
    matrix_rows: int = 0
    wide: int = 0
    copies: int = 0
    flops: int = 0
    bytes: int = 0

    def key(self) -> tuple:
        """Return what decides the machine code: cases of equal keys compile once."""
        parts = (self.signature, self.constants, self.multiples)
        name = f"{self.function.__module__}.{self.function.__name__}"
        return (name, self.arch, self.tile.warps, self.tile.stages, *map(repr, parts))

    def matrix_instruction(self) -> str | None:
        """Return the tensor-core instruction that this case must be made of."""
        if not self.matrix_rows:
            return None
        return "HGMMA" if self.arch == 90 and self.matrix_rows >= 64 else "HMMA"


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
    # Of every main loop, once around: count's names, and "all" for the sum.
    loops: list[dict[str, int]] = dataclasses.field(default_factory=list)
    blocks: int = 0  # that a multiprocessor holds at once
    flops_per_byte: float = 0
    matrix: str | None = None  # instruction that must be there
    wide: int = 0  # 16-byte loads that must be there
    copies: int = 0  # of those, in every main loop
    tma: bool = False  # whether operands must come through tensor descriptors


def disassemble(cubin: pathlib.Path, *options: str) -> str:
    env = dict(os.environ, PATH=f"{TOOLS}{os.pathsep}{os.environ['PATH']}")
    command = [str(TOOLS / "cuobjdump"), *options, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout


_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M
)


def opcodes(sass: str) -> list[str]:
    return [match[2] for match in _INSTRUCTION.finditer(sass)]


def count(ops: list[str]) -> dict[str, int]:
    """Count instructions by name; those with .128 are the 16-byte ones among their kind."""
    names = collections.Counter(op.split(".")[0] for op in ops)
    for kind in ("LDG", "LDGSTS"):
        names[f"{kind}.128"] = sum(op.startswith(f"{kind}.") and ".128" in op for op in ops)
    names["ATOM"] = sum(op.startswith("ATOM") for op in ops)
    return {name: names[name] for name in COUNTED if names[name]}


def loops(sass: str) -> list[dict[str, int]]:
    """Count the instructions of every innermost loop that holds a tensor-core product."""
    found = []
    code = [(int(m[1], 16), m[2], m[3]) for m in _INSTRUCTION.finditer(sass)]
    places = {address: i for i, (address, _, _) in enumerate(code)}
    for i, (_, op, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        start = places.get(int(target[1], 16), i + 1) if target else i + 1
        if start <= i:
            found.append((start, i))
    # Waiting code that lies behind a loop jumps back into its middle, which makes it no loop.
    found = [(s, e) for s, e in found if not any(a < s <= b < e for a, b in found)]
    held = [
        (start, end)
        for start, end in found
        if any(op.startswith(("HGMMA", "HMMA")) for _, op, _ in code[start : end + 1])
    ]
    inner = [
        (s, e) for s, e in held if not any(s <= a and b <= e and (a, b) != (s, e) for a, b in held)
    ]
    bodies = ([op for _, op, _ in code[start : end + 1]] for start, end in inner)
    return [{"all": len(body), **count(body)} for body in bodies]


def blocks_per_multiprocessor(arch: int, registers: int, threads: int, shared: int) -> int:
    """Return how many blocks of threads one multiprocessor holds at once."""
    most_threads, most_blocks, most_shared = RESIDENT[arch]
    warps = threads // 32
    register_warps = 65536 // (-(-registers // 8) * 8 * 32)  # given out in eights per thread
    # Each of four schedulers has a quarter of the registers.
    by_registers = register_warps // 4 * 4 // warps
    by_shared = most_shared // (shared + RESERVED_SHARED)
    return min(most_blocks, most_threads // threads, by_registers, by_shared)


def _compile(case: Case):
    names = case.function.arg_names
    given = set(case.signature) | set(case.constants)
    if given != set(names) or set(case.signature) & set(case.constants):
        raise ValueError(f"{case.op}, {case.variant}: arguments {sorted(given ^ set(names))}")
    types = {n: "constexpr" if n in case.constants else case.signature[n] for n in names}
    divisible = [
        name
        for name, kind in case.signature.items()
        if kind.startswith("*") or name in case.multiples
    ]
    source = ASTSource(
        fn=case.function,
        signature=types,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def _read(compiled) -> tuple[dict[str, int], str]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", disassemble(cubin, "-res-usage"))}
        sass = disassemble(cubin, "-sass")
    return usage, sass


def facts_of(case: Case) -> Facts:
    """Compile a case and report it."""
    compiled = _compile(case)
    usage, sass = _read(compiled)
    ops, shared = opcodes(sass), compiled.metadata.shared
    # Warps that the compiler added for a part of its own (warp specialisation) count.
    threads = int(re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])[1])
    blocks = blocks_per_multiprocessor(case.arch, usage["REG"], threads, shared)
    return Facts(
        case.op, case.variant, f"sm_{case.arch}", usage["REG"], usage["STACK"] + usage["LOCAL"],
        shared, threads, len(ops), count(ops), loops(sass), blocks,
        case.flops / case.bytes if case.bytes else 0, case.matrix_instruction(), case.wide,
        case.copies, case.tile.tma,
    )  # fmt: skip
