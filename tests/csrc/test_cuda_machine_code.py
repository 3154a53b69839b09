"""Machine code of the CUDA C++ kernels for sm_80 and sm_90a, compiled by nvcc without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

AOT = pathlib.Path(__file__).resolve().parents[1] / "kernels" / "aot_check.py"


@pytest.fixture(scope="module")
def facts() -> list[dict]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if not (shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")):
        pytest.skip("nvcc is not installed: CUDA C++ cannot be compiled")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: its cuobjdump reads the machine code")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(AOT), "--only", "cuda"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_both_targets(facts):
    for arch in ("sm_80", "sm_90a"):
        kernels = [f for f in facts if f["arch"] == arch]
        # columns: 3 dtypes, wide and scalar; runs: 3 dtypes, aligned and not; one combine.
        assert len(kernels) == 13


def test_nothing_spills_and_two_blocks_fit_a_multiprocessor(facts):
    for f in facts:
        assert f["spilled"] == 0 and not {"STL", "LDL"} & set(f["counts"]), f
        assert f["registers"] * f["threads"] * 2 <= 65536, f
        assert f["shared_bytes"] * 2 <= 163 << 10, f


def test_wide_variants_load_16_bytes_and_nothing_is_atomic(facts):
    for f in facts:
        assert not {"ATOM", "RED"} & set(f["counts"]), f
        if " x 8" in f["variant"] or " x 4" in f["variant"]:
            # Four loads in flight in the main loop and at least one for the remainder.
            assert f["counts"].get("LDG.128", 0) >= 5, f
