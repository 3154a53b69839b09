"""Machine code of the Triton kernels for sm_80 and sm_90, compiled here without a GPU."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10}


@pytest.fixture(scope="module")
def facts() -> list[dict]:
    # Its own process: there TRITON_INTERPRET must be unset before Triton is imported.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "aot_check.py"), "--only", "triton"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def products(facts: list[dict], arch: str) -> list[dict]:
    return [f for f in facts if f["kernel"] == "masked_linear" and f["arch"] == arch]


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_no_kernel_spills_or_exceeds_shared_memory(facts, arch):
    mine = [f for f in facts if f["arch"] == arch]
    assert len(mine) >= 8
    for f in mine:
        assert f["spilled"] == 0 and not {"STL", "LDL"} & set(f["counts"]), f
        assert f["shared_bytes"] <= SHARED_LIMIT[arch], f
        assert f["registers"] * f["threads"] <= 65536, f


def test_products_run_on_the_tensor_cores_of_their_target(facts):
    for f in products(facts, "sm_80"):
        assert f["counts"].get("HMMA", 0) >= 8, f
    for f in products(facts, "sm_90"):
        # Tiles of 16 rows serve small batches; sm_90's own instruction needs 64.
        wanted = "HMMA" if ", 16x" in f["variant"] else "HGMMA"
        assert f["counts"].get(wanted, 0) >= 4, f
    for f in products(facts, "sm_80") + products(facts, "sm_90"):
        assert f["counts"].get("FFMA", 0) == 0, f


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_operands_travel_in_16_byte_asynchronous_copies(facts, arch):
    # Two operands and the mask words, several copies each, in every pipeline stage.
    for f in products(facts, arch):
        assert f["counts"].get("LDGSTS", 0) >= 20, f
    lists = [f for f in facts if f["kernel"].endswith("block list") and f["arch"] == arch]
    assert lists and all(f["counts"].get("LDG.128", 0) >= 4 for f in lists)
