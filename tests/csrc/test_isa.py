"""Every instruction set this CPU has, forced in a process of its own."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys

import pytest

from liveweight import _library

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
ISAS = ("avx512", "avx2", "plain")
needs_kernels = pytest.mark.skipif(
    _library.status()["cpu"] != "loaded", reason=f"CPU kernels: {_library.status()['cpu']}"
)


def run(script: str, isa: str, *flags: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "LIVEWEIGHT_CPU": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *flags, script], env=env, capture_output=True, text=True, timeout=120
    )


@functools.cache
def self_check(isa: str) -> list:
    done = run(str(HERE / "isa_check.py"), isa)
    if "does not support it" in done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
def test_every_op_agrees_with_the_reference(isa):
    chosen, names, failures = self_check(isa)
    assert chosen == isa
    assert {"activity_stats_", "mass_mask"} <= set(names)
    assert failures == []


@needs_kernels
def test_an_unknown_instruction_set_is_an_error():
    done = run("from liveweight import _library; _library.cpu_isa()", "avx1024", "-c")
    assert done.returncode != 0
    assert "LIVEWEIGHT_CPU: expected avx512, avx2 or plain, got avx1024" in done.stderr


@needs_kernels
def test_backends_name_the_instruction_set():
    assert _library.cpu_isa() in ISAS
    assert _library.backends()["mass_mask"]["cpu"] == f"c++ ({_library.cpu_isa()})"


def build_plan():
    spec = importlib.util.spec_from_file_location(
        "ninja_plan", ROOT / "csrc" / "build" / "ninja_plan.py"
    )
    plan = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plan)
    return plan


@pytest.mark.parametrize("check", ["simd_check", "activation_check"])
@pytest.mark.parametrize("isa", ISAS)
def test_header(isa, check, tmp_path):
    """simd.h and activation.h, each compiled on its own, lane by lane, against scalar code."""
    plan = build_plan()
    try:
        cxx = plan.compiler()
    except plan.Missing as missing:
        pytest.skip(str(missing))
    if isa != "plain" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{isa} is for x86")
    if isa != "plain" and isa not in pathlib.Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {isa}")
    program = tmp_path / check
    flags = ["-std=c++20", "-O1", "-Wall", "-ffp-contract=fast", f"-DLW_ISA={isa}"]
    source = ["-I", str(ROOT / "csrc" / "cpu"), str(HERE / f"{check}.cpp"), "-o", str(program)]
    subprocess.run([*cxx.split(), *flags, *plan.ISA_FLAGS[isa].split(), *source], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(" 0 failures\n")
