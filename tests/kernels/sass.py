"""Read machine code of NVIDIA GPUs: disassembly, opcodes, loops, occupancy. Needs no GPU."""

from __future__ import annotations

import collections
import importlib.util
import os
import pathlib
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping

COUNTED = (
    "HGMMA", "HMMA", "HMMA.SP", "FFMA", "UTMALDG", "UTMASTG", "LDGSTS.128", "LDGSTS", "LDG.128",
    "LDG", "STL", "LDL", "ATOM", "RED",
)  # fmt: skip
# Per architecture: threads, blocks and bytes of shared memory that a multiprocessor holds.
RESIDENT = {
    80: (2048, 32, 164 << 10),
    86: (1536, 16, 100 << 10),
    89: (1536, 24, 100 << 10),
    90: (2048, 32, 228 << 10),
}
RESERVED_SHARED = 1 << 10  # bytes that the driver takes of every block's shared memory

_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M
)


def tools() -> pathlib.Path:
    """Return the folder of cuobjdump and nvdisasm, which come with Triton."""
    spec = importlib.util.find_spec("triton")  # found, not imported
    if spec is None or spec.origin is None:
        raise RuntimeError("triton is not installed: its cuobjdump reads the machine code")
    return pathlib.Path(spec.origin).parent / "backends" / "nvidia" / "bin"


def disassemble(binary: pathlib.Path, *options: str) -> str:
    """Return what cuobjdump prints of a cubin, an object or a shared library."""
    env = dict(os.environ, PATH=f"{tools()}{os.pathsep}{os.environ['PATH']}")
    command = [str(tools() / "cuobjdump"), *options, str(binary)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout


def opcodes(sass: str) -> list[str]:
    """Return the opcode of every instruction, modifiers included."""
    return [match[2] for match in _INSTRUCTION.finditer(sass)]


def is_a(op: str, wanted: str) -> bool:
    """Return whether an opcode is of this kind: LDG.E.128.CONSTANT is LDG and LDG.128."""
    first, *modifiers = wanted.split(".")
    kind = op.split(".")
    # ATOMG and ATOMS, on global and on shared memory, are both ATOM.
    same = kind[0].startswith("ATOM") if first == "ATOM" else kind[0] == first
    return same and all(modifier in kind[1:] for modifier in modifiers)


def number_of(ops: Mapping[str, int], wanted: str) -> int:
    """Return how many instructions of this kind are among counted opcodes."""
    return sum(n for op, n in ops.items() if is_a(op, wanted))


def count(ops: Iterable[str] | Mapping[str, int]) -> dict[str, int]:
    """Count instructions by name; those with .128 are the 16-byte ones among their kind."""
    counted = collections.Counter(ops)
    numbers = {name: number_of(counted, name) for name in COUNTED}
    return {name: number for name, number in numbers.items() if number}


def all_loops(sass: str) -> list[tuple[int, int, list[str]]]:
    """Return first and last instruction of every loop, by number, and the opcodes once around."""
    found = []
    code = [(int(m[1], 16), m[2], m[3]) for m in _INSTRUCTION.finditer(sass)]
    places = {address: i for i, (address, _, _) in enumerate(code)}
    for i, (_, op, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        start = places.get(int(target[1], 16), i + 1) if target else i + 1
        if start < i:  # a jump to itself is the padding behind the code
            found.append((start, i))
    # Waiting code that lies behind a loop jumps back into its middle, which makes it no loop.
    found = [(s, e) for s, e in found if not any(a < s <= b < e for a, b in found)]
    return [(s, e, [op for _, op, _ in code[s : e + 1]]) for s, e in sorted(set(found))]


def innermost(loops: list, holds: Callable[[Iterable[str]], bool]) -> list:
    """Return the loops (start, end, opcodes) that hold something, without those around another."""
    held = [loop for loop in loops if holds(loop[2])]
    spans = [(s, e) for s, e, _ in held]
    return [
        (s, e, ops)
        for s, e, ops in held
        if not any(s <= a and b <= e and (a, b) != (s, e) for a, b in spans)
    ]


def loops(sass: str) -> list[dict[str, int]]:
    """Count the instructions of every innermost loop that holds a tensor-core product."""
    products = ("HGMMA", "HMMA")
    found = innermost(all_loops(sass), lambda ops: any(op.startswith(products) for op in ops))
    return [{"all": len(ops), **count(ops)} for _, _, ops in found]


def blocks_per_multiprocessor(arch: int, registers: int, threads: int, shared: int) -> int:
    """Return how many blocks of threads one multiprocessor holds at once."""
    most_threads, most_blocks, most_shared = RESIDENT[arch]
    warps = threads // 32
    register_warps = 65536 // (-(-registers // 8) * 8 * 32)  # given out in eights per thread
    # Each of four schedulers has a quarter of the registers.
    by_registers = register_warps // 4 * 4 // warps
    by_shared = most_shared // (shared + RESERVED_SHARED)
    return min(most_blocks, most_threads // threads, by_registers, by_shared)
