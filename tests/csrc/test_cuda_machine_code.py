"""Machine code of the CUDA C++ kernels for sm_80 and sm_90a, as nvcc left it in _cuda.so.

What is asked of one op's kernels is in tests/kernels/code_<op>.py; what of all, is here.
"""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "kernels"))

import cuda_code  # noqa: E402
import sass  # noqa: E402

FLOATS = {"F16", "BF16", "F16x2", "BF16x2", "BF16_V2", "F32", "F64"}


@pytest.fixture(scope="module")
def codes() -> list[cuda_code.Code]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: its cuobjdump reads the machine code")
    if not cuda_code.LIBRARY.exists():
        pytest.skip("_cuda.so is not built: nvcc was not found")
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt is not installed: the kernels' names cannot be read")
    return cuda_code.read()


@pytest.fixture(scope="module")
def table() -> dict[str, list[cuda_code.Expected]]:
    return cuda_code.expectations()


def at(code: cuda_code.Code) -> str:
    return f"{code.source}: {code.name}, {code.arch}"


def test_every_file_of_kernels_is_built_for_both_targets_and_says_what_it_expects(codes, table):
    files = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    for arch in cuda_code.ARCHS:
        assert {code.source for code in codes if code.arch == arch} == files
    assert set(table) == files, "each csrc/cuda/<op>.cu needs tests/kernels/code_<op>.py"


def test_every_expectation_names_a_kernel_and_every_kernel_has_one(codes, table):
    for source, expected in table.items():
        here = [code for code in codes if code.source == source]
        for code in here:
            assert any(e.matches(code) for e in expected), f"{at(code)} has no expectation"
        for e in expected:
            for arch in e.archs:
                assert any(e.matches(code) for code in here if code.arch == arch), (source, e)


def test_nothing_spills(codes):
    for code in codes:
        assert code.spilled == 0, f"{at(code)}: {code.spilled} bytes of stack or local memory"
        assert not sass.number_of(code.ops, "STL") + sass.number_of(code.ops, "LDL"), at(code)


def test_no_float_is_added_in_an_order_of_chance(codes):
    for code in codes:
        for op in code.ops:
            if sass.is_a(op, "ATOM") or sass.is_a(op, "RED"):
                kind = set(op.split("."))
                assert not FLOATS & kind, f"{at(code)}: {op}"
                # Floats in shared memory are added by 32-bit exchanges, int64 by 64-bit ones.
                assert "CAST" not in kind or "64" in kind, f"{at(code)}: {op}"


def test_every_kernel_says_how_many_threads_it_has(codes, table):
    for code in codes:
        threads = cuda_code.expected_of(code, table).threads or code.threads
        assert threads, f"{at(code)}: no __launch_bounds__, and no threads= in its expectation"


def test_enough_blocks_fit_a_multiprocessor(codes, table):
    for code in codes:
        e = cuda_code.expected_of(code, table)
        held = code.blocks(e)
        assert held >= e.blocks, (
            f"{at(code)}: {held} blocks fit, expected {e.blocks}: {code.registers} registers, "
            f"{code.threads} threads, {code.shared} + {e.shared} bytes of shared memory"
        )


def test_the_instructions_that_each_kernel_is_made_of(codes, table):
    for code in codes:
        e = cuda_code.expected_of(code, table)
        for op in e.must:
            assert sass.number_of(code.ops, op), f"{at(code)}: no {op}"
        for op in e.must_not:
            assert not sass.number_of(code.ops, op), f"{at(code)}: {op}"


def test_instructions_per_dense_weight(codes, table):
    for code in codes:
        e = cuda_code.expected_of(code, table)
        if e.weights:
            found = code.per_weight(e)
            assert found is not None, f"{at(code)}: no loop holds {e.loop}"
            assert not e.most or found <= e.most, (
                f"{at(code)}: {found:.2f} instructions per dense weight, expected {e.most} at most"
            )


def test_loops_and_unrolling_are_read_from_the_jumps():
    lines = [
        "/*0000*/ MOV R1, R2 ;", "/*0010*/ HMMA.16816.F32 R4, R8, R2, R4 ;",
        "/*0020*/ LDG.E.128.CONSTANT R4, [R2] ;", "/*0030*/ HMMA.16816.F32 R4, R8, R2, R4 ;",
        "/*0040*/ @P0 BRA 0x20 ;", "/*0050*/ @!P1 BRA 0x10 ;", "/*0060*/ EXIT ;",
        "/*0070*/ BRA 0x70;",
    ]  # fmt: skip
    text = "\n".join(f"        {line}" for line in lines)
    loops = [(s, e, {op: ops.count(op) for op in ops}) for s, e, ops in sass.all_loops(text)]
    assert [(s, e) for s, e, _ in loops] == [(1, 5), (2, 4)]
    ops = {op: sass.opcodes(text).count(op) for op in sass.opcodes(text)}
    code = cuda_code.Code("op", "kernel<8>", "sm_90a", 64, 0, 0, 128, ops, loops)
    assert code.main_loop("HMMA") == {"LDG.E.128.CONSTANT": 1, "HMMA.16816.F32": 1, "BRA": 1}
    assert code.main_loop("FFMA") == {}
    assert sass.count(ops) == {"HMMA": 2, "LDG.128": 1, "LDG": 1}
    e = cuda_code.Expected(kernel="kernel<8>", loop="HMMA", per_loop=2, weights=16)
    assert code.per_weight(e) == 3 / (0.5 * 16)
