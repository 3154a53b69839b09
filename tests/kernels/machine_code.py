"""Compile one Triton kernel for a named GPU without one, and read what the compiler made of it.

A case says what the JIT would have specialised on: types, compile-time constants, which numbers
are multiples of 16. Registers, spills and shared memory are the compiler's report; instructions are
counted in the disassembly (cuobjdump comes with Triton).
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tempfile
from typing import Any

import triton
from sass import blocks_per_multiprocessor, count, disassemble, loops, opcodes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from liveweight.kernels.tiles import Tile


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
