"""The GPU suite, as far as it goes without a GPU: cases, arithmetic, targets, page, exit code."""

from __future__ import annotations

import importlib
import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {
    "block_cases": {
        "DTYPE": torch.float32, "SPARSITIES": (0.5,), "BLOCKS": ((16, 16), (16, 1)),
        "OTHER_MANY": (), "OTHER_FEW": ((16, 1),),
        "MANY": ((9, 40, 70),), "FEW": ((2, 40, 70),),
        "CONVS": ((2, 20, 6, 1), (2, 20, 6, 2)), "CONV_BLOCKS": ((16, 16),),
    },
    "masked_cases": {
        "MASKED": [((4, 130, 70), torch.float32, kind) for kind in ("random 0.5", "block 0.5")]
    },
    "other_cases": {
        "ACTIVITY": [((9, 5, 1), torch.float32), ((3, 2, 4), torch.half)],
        "PEAK_SIDE": 32, "COPY_BYTES": 64,
    },
    "unstructured_cases": {
        "DTYPE": torch.float32, "SHAPES": ((1, 40, 70), (70, 40, 70)), "SPARSITIES": (0.5, 0.9),
    },
    "nm_cases": {"DTYPE": torch.float32, "FEW": ((2, 40, 72),), "MANY": ((70, 40, 72),)},
    "score_cases": {"SCORES": ((5, 40),), "VGG": ((3, 4, 5, 6, torch.float32),)},
    "kernelwise_cases": {"SIZES": ((2, 6, 5), (1, 4, 6)), "SPARSITIES": (0.5,)},
    "net_cases": {"DTYPE": torch.float32, "VIT_S": (64, 128, 5), "NETS": (("ViT-S MLP", 0.5),)},
}  # fmt: skip


@pytest.fixture
def load(monkeypatch):
    """Import a module of the suite by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(f"gpu.{name}" if name else "gpu_timing")


@pytest.fixture
def suite(load, monkeypatch):
    """The suite on the CPU in small, each call made once instead of timed; returns its groups."""
    rows, timing = load("rows"), load("")

    def call_once(calls, sets, rounds=1):
        for call in calls.values():
            call(sets - 1)
        return {name: timing.Timing(10.0 + i, 9.0, 12.0) for i, name in enumerate(calls)}

    monkeypatch.setattr(rows, "DEVICE", "cpu")
    monkeypatch.setattr(rows, "l2_bytes", lambda: 1000)
    monkeypatch.setattr(rows, "time_in_turns", call_once)
    monkeypatch.setattr(rows, "time_eager", lambda call, sets: call_once({"": call}, sets)[""])
    for module, settings in SMALL.items():
        for name, value in settings.items():
            monkeypatch.setattr(load(module), name, value)
    return load("__main__").GROUPS


@pytest.mark.parametrize(
    "group",
    ["peak", "unstructured_linear", "semi-structured", "selection", "conv scores",
     "kernelwise_conv2d", "block_linear", "block_conv2d", "masked_linear",
     "masked_linear backward", "activity_stats_", "small calls", "training step", "nets"],
)  # fmt: skip
def test_every_case_runs_and_its_results_are_checked(suite, group):
    found = [row for case in suite[group]() for row in case.measure(group == "small calls")]
    assert found and all(row.group == group for row in found)
    for row in found:
        assert row.median_us > 0 and row.ratio > 0 and row.where["op"]
    if group != "peak":
        assert {"ours", "dense"} <= {row.kind for row in found}


def test_a_wrong_result_stops_its_case(load):
    check = load("rows").check
    with pytest.raises(RuntimeError, match="thing: wrong result, relative error"):
        check("thing", torch.ones(3), torch.full((3,), 1.1), 1e-3)
    with pytest.raises(RuntimeError, match="relative error nan"):
        check("thing", torch.tensor([float("nan")]), torch.ones(1), 1e-3)


def test_block_masks_keep_or_remove_whole_blocks(suite, load):
    mask = load("rows").random_blocks(130, 200, (64, 32), 0.5)
    assert mask.shape == (130, 200)
    cut = [mask[n : n + 64, k : k + 32] for n in range(0, 130, 64) for k in range(0, 200, 32)]
    assert all(block.all() or not block.any() for block in cut)
    assert sum(bool(block.all()) for block in cut) == round(0.5 * len(cut))


def test_input_sets_together_exceed_the_cache(load):
    timing = load("")
    assert timing.sets_needed(10 << 20, 50 << 20) == 20
    assert timing.sets_needed(1 << 30, 50 << 20) == 2
    assert timing.sets_needed(0, 50 << 20) == timing.MOST_SETS
    assert timing.summarize([1.0, 2.0, 3.0, 4.0, 100.0]) == timing.Timing(3.0, 2.0, 4.0)


def row(call, us, kind="ours", where=None, group="block_linear", case="c", **rest):
    where = where or {"op": "block_linear", "block": "64x64", "tokens": 8192, "sparsity": 0.5,
                      "shape": [4, 4]}  # fmt: skip
    return {
        "group": group, "case": case, "call": call, "kind": kind, "median_us": us, "low_us": us,
        "high_us": us, "ratio": 1.0, "sparse": None, "where": where, "flops": 0.0, "bytes": 0.0,
        "note": "",
    } | rest  # fmt: skip


def test_targets_take_our_fastest_call_and_the_worst_case(load):
    targets = load("targets")
    found = [row("block_linear 64x64", 5.0), row("block_linear 32x64", 4.0)]
    found += [row("cuBLAS", 8.0, "dense"), row("torch.compile", 7.0, "dense")]
    found += [row("torch BSR", 3.0, "sparse")]
    verdicts = {v.target.case: v for v in targets.judge(found)}
    many = verdicts["blocks 64x64, many tokens, 50 %"]
    assert (many.measured, many.words, many.rows) == (7.0 / 4.0, "goal", 1)
    bsr = verdicts["block_linear against torch's own BSR kernels"]
    assert (bsr.measured, bsr.words) == (0.75, "missed")
    assert verdicts["compress_ on every net"].words == "not measured"
    slower = [row("block_linear 64x64", 5.0, case="d"), row("cuBLAS", 5.0, "dense", case="d")]
    verdicts = {v.target.case: v for v in targets.judge([*found, *slower])}
    many = verdicts["blocks 64x64, many tokens, 50 %"]
    assert (many.measured, many.words, many.rows, many.worst) == (1.0, "missed", 2, "d")


def test_every_kind_of_case_has_a_target(load):
    targets = load("targets").TARGETS
    ops = {t.where["op"] for t in targets}
    assert ops == {
        "block_linear", "block_conv2d", "masked_linear", "training step", "compress_",
        "unstructured_linear", "semi_structured", "kernelwise_conv2d", "activity_stats_",
        "mass_mask", "conv scores",
    }  # fmt: skip
    assert len(targets) == 45
    assert all(t.goal is None or t.goal > t.floor for t in targets)


def test_the_page_shows_machine_limits_and_losses(load):
    page = load("page")
    peak = {"op": "peak", "what": "compute"}
    rows = [row("cuBLAS", 10.0, "dense", peak, "peak", flops=1e9)]
    rows += [row("block_linear 64x64", 4.0, ratio=0.5, flops=2e8), row("cuBLAS", 2.0, "dense")]
    text = page.markdown(
        {
            "machine": {"gpu": "X1", "commit": "abc"},
            "tests": {"summary": "9 passed"},
            "problems": ["nets: not run"],
            "rows": rows,
            "plots": {"speedup.png": "Speed-up"},
        }
    )
    for part in ("* gpu: X1", "* commit: abc", "9 passed", "problem: nets: not run", "**0.50**"):
        assert part in text
    assert "| 50 % |" in text and "50 TFLOP/s" in text and "![Speed-up](speedup.png)" in text
    assert "| blocks 64x64, many tokens, 50 % | 1.5x | 1.7x | 0.50x | **missed** | 1 | c |" in text


def test_plots_show_our_best_call_of_each_case(load, tmp_path):
    plots = load("plots")
    rows = [row("block_linear 64x64", 4.0, ratio=1.5), row("block_linear 32x64", 4.0, ratio=2.5)]
    assert plots.curves(rows) == {"8192 tokens, 4x4": {"64x64": [(0.5, 2.5)]}}
    pytest.importorskip("matplotlib")
    peak = {"op": "peak", "what": "compute"}
    rows += [row("cuBLAS", 10.0, "dense", peak, "peak", flops=1e9)]
    rows += [row("copy", 10.0, "dense", peak | {"what": "memory"}, "peak", bytes=1e6)]
    rows += [row("block_linear 64x64", 4.0, flops=1e8, bytes=1e5)]
    assert set(plots.draw(rows, tmp_path)) == {"speedup.png", "roofline.png"}
    assert (tmp_path / "roofline.png").stat().st_size > 1000


def test_files_with_gpu_tests_are_found(load):
    found = {pathlib.Path(path).relative_to(ROOT) for path in load("__main__").gpu_tests()}
    wanted = {"tests/kernels/test_masked_linear.py", "tests/compress/test_measure_cuda.py"}
    wanted |= {"tests/csrc/test_cuda_ptx.py", "tests/csrc/test_cuda_delta_linear.py"}
    assert wanted <= set(map(str, found))
    assert pathlib.Path("tests/kernels/test_aot.py") not in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(load, tmp_path, capsys):
    main = load("__main__").main
    assert main(["--out", str(tmp_path / "gpu")]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "gpu").exists()
    assert main(["--out", str(tmp_path / "gpu"), "--page-only"]) == 0
    text = (tmp_path / "gpu" / "README.md").read_text()
    assert "Nothing has been measured on a GPU yet" in text and text.count("not measured") == 45


def test_unknown_groups_are_refused(load, capsys):
    with pytest.raises(SystemExit):
        load("__main__").main(["--only", "blocks"])
    assert "no group ['blocks']" in capsys.readouterr().err
