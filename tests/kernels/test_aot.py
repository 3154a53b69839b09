"""Machine code of the Triton kernels, compiled here without a GPU for every row of the table."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}


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


def test_every_op_of_the_table_is_compiled_for_every_section(facts):
    table = pytest.importorskip("liveweight.kernels.tile_table").TABLE
    compiled = {(f["kernel"], f["arch"]) for f in facts}
    for op, sections in table.items():
        for arch in sections:
            assert (op, f"sm_{arch}") in compiled


def test_no_kernel_spills(facts):
    for f in facts:
        assert f["spilled"] == 0 and not {"STL", "LDL"} & set(f["counts"]), f


def test_every_kernel_fits_its_multiprocessor(facts):
    for f in facts:
        assert f["shared_bytes"] <= SHARED_LIMIT[f["arch"]], f
        assert f["registers"] * f["threads"] <= 65536 and f["blocks"] >= 1, f


def test_products_run_on_the_tensor_cores_of_their_target(facts):
    products = [f for f in facts if f["matrix"]]
    assert products
    for f in products:
        assert f["loops"] and f["flops_per_byte"] > 0, f
        for loop in f["loops"]:
            assert loop.get(f["matrix"], 0) >= 1 and "FFMA" not in loop, f


def test_operands_travel_in_16_bytes_or_by_tensor_descriptors(facts):
    for f in facts:
        counts = f["counts"]
        assert counts.get("LDG.128", 0) + counts.get("LDGSTS.128", 0) >= f["wide"], f
        for loop in f["loops"]:
            assert loop.get("LDG.128", 0) + loop.get("LDGSTS.128", 0) >= f["copies"], f
        assert counts.get("UTMALDG", 0) >= (1 if f["tma"] else 0), f


def test_nothing_is_added_up_in_an_order_of_chance(facts):
    for f in facts:
        assert not {"ATOM", "RED"} & set(f["counts"]), f
