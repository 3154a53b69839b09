"""The GPU entry point, as far as it goes without a GPU: cases, arithmetic, page, exit code."""

from __future__ import annotations

import importlib
import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu_module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str):
        return importlib.import_module(name)

    return load


@pytest.fixture
def cases(gpu_module, monkeypatch):
    """The cases on the CPU in small, each call made once instead of timed."""
    module, timing = gpu_module("gpu_cases"), gpu_module("gpu_timing")

    def call_once(calls, sets, rounds=1):
        for call in calls.values():
            call(sets - 1)
        return {name: timing.Timing(10.0 + i, 9.0, 12.0) for i, name in enumerate(calls)}

    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "_l2_bytes", lambda: 1000)
    monkeypatch.setattr(module, "time_in_turns", call_once)
    monkeypatch.setattr(module, "time_eager", lambda call, sets: call_once({"": call}, sets)[""])
    monkeypatch.setattr(module, "ACTIVITY", [((9, 5, 1), torch.float32), ((3, 2, 4), torch.half)])
    shape = (4, 130, 70)
    monkeypatch.setattr(
        module, "MASKED", [(shape, torch.float32, kind) for kind in ("random 0.5", "block 0.5")]
    )
    return module


def test_every_case_runs_and_its_results_are_checked(cases):
    for group in ("activity_stats_", "masked_linear", "small calls"):
        rows = [row for part in cases.GROUPS[group]() for row in part]
        assert len(rows) >= 4
        for row in rows:
            assert row.median_us > 0 and row.ratio > 0
            assert row.call != row.baseline or row.ratio == 1


def test_a_wrong_result_stops_its_case(cases):
    with pytest.raises(RuntimeError, match="thing: wrong result, relative error"):
        cases.check("thing", torch.ones(3), torch.full((3,), 1.1), 1e-3)
    with pytest.raises(RuntimeError, match="relative error nan"):
        cases.check("thing", torch.tensor([float("nan")]), torch.ones(1), 1e-3)


def test_block_masks_keep_or_remove_whole_blocks(cases):
    mask = cases.make_mask("block 0.5", 130, 200)
    assert mask.shape == (130, 200)
    for n in range(0, 130, cases.BLOCK):
        for k in range(0, 200, cases.BLOCK):
            block = mask[n : n + cases.BLOCK, k : k + cases.BLOCK]
            assert block.all() or not block.any()


def test_input_sets_together_exceed_the_cache(gpu_module):
    timing = gpu_module("gpu_timing")
    assert timing.sets_needed(10 << 20, 50 << 20) == 20
    assert timing.sets_needed(1 << 30, 50 << 20) == 2
    assert timing.sets_needed(0, 50 << 20) == timing.MOST_SETS
    assert timing.summarize([1.0, 2.0, 3.0, 4.0, 100.0]) == timing.Timing(3.0, 2.0, 4.0)


def test_the_page_names_the_machine_and_marks_losses(gpu_module):
    row = {"case": "c", "call": "a", "median_us": 4.0, "low_us": 3.0, "high_us": 5.0}
    rows = [row | {"ratio": 2.0, "baseline": "b", "note": ""}]
    rows.append(row | {"ratio": 0.5, "baseline": "b", "note": "1 TB/s"})
    page = gpu_module("gpu").markdown(
        {
            "machine": {"gpu": "X1", "commit": "abc"},
            "tests": {"summary": "9 passed"},
            "problems": ["tiles: not run"],
            "benchmarks": {"group": rows},
        }
    )
    for text in ("* gpu: X1", "* commit: abc", "9 passed", "problem: tiles: not run", "| 2.00 |"):
        assert text in page
    assert "| **0.50** | b | 1 TB/s |" in page


def test_files_with_gpu_tests_are_found(gpu_module):
    found = {pathlib.Path(path).relative_to(ROOT) for path in gpu_module("gpu").gpu_tests()}
    assert pathlib.Path("tests/csrc/test_cuda_emulated.py") in found
    assert pathlib.Path("tests/kernels/test_masked_linear.py") in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(gpu_module, tmp_path, capsys):
    assert gpu_module("gpu").main(["--out", str(tmp_path / "gpu")]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "gpu").exists()
