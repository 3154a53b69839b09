"""The machinery of the CPU benchmark suite on tiny sizes: turns, checks, targets, page, recipes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib

import pytest
import torch

import liveweight as lw
from liveweight.compress.measure import Timings

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMPILED = lw.info().parts["cpu"] == "loaded"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    return importlib.import_module


@pytest.fixture
def timing(load):
    return load("cpu.timing")


def a_cell(timing, wrong: bool = False):
    x = torch.arange(6.0)
    calls = {
        timing.OURS: lambda: x + (1e-3 if wrong else 0),
        "plain": lambda: x.clone(),
        "packed": lambda: x * 1,
        "csr": lambda: x / 1,
    }
    kinds = {"plain": "torch", "packed": "dense", "csr": "sparse"}
    return timing.Cell({"batch": 1}, calls, kinds, flops=12.0, truth=lambda: x.double())


def test_turns_rotate_and_are_reversed_every_round(timing):
    names = ["a", "b", "c"]
    assert [timing.order(names, i) for i in range(4)] == [
        ["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"], ["a", "c", "b"],
    ]  # fmt: skip


@pytest.mark.parametrize("cold", [False, True])
def test_every_call_is_timed_equally_often(timing, monkeypatch, cold):
    flushes = []
    monkeypatch.setattr(timing, "flush", lambda: flushes.append(1))
    settings = timing.Settings(seconds=1e-3, min_rounds=3, max_rounds=3)
    calls = {timing.OURS: lambda: None, "other": lambda: sum(range(1000))}
    timings = timing.paired(calls, settings, cold)
    assert {len(v) for v in timings.samples.values()} == {3}
    assert timings.median_us("other") > timings.median_us(timing.OURS) > 0
    assert bool(flushes) == cold


def test_a_call_that_takes_too_long_is_not_repeated(timing):
    count = []
    settings = timing.Settings(seconds=1e-6, min_rounds=5, longest=1e-6)
    calls = {timing.OURS: lambda: None, "slow": lambda: count.append(sum(range(20000)))}
    timings = timing.paired(calls, settings)
    assert timings.screened == {"slow"} and len(count) <= 2
    assert timings.speedup(timing.OURS, "slow") > 1


def test_rows_hold_paired_ratios_and_the_share_of_the_peak(timing, monkeypatch):
    samples = {
        timing.OURS: [1.0, 2.0, 4.0], "plain": [4.0, 8.0, 4.0], "packed": [3.0, 2.0, 12.0],
        "csr": [10.0, 20.0, 40.0],
    }  # fmt: skip
    monkeypatch.setattr(timing, "paired", lambda *_: Timings(samples))
    row = timing.measure(a_cell(timing), timing.Settings(peaks={1: 0.012}))
    assert (row["torch"], row["dense"], row["sparse"]) == (4.0, 3.0, 10.0)
    assert row["gflops"] == pytest.approx(12 / 2 / 1e3) and row["peak"] == pytest.approx(0.5)
    assert json.loads(json.dumps(row))["us"]["plain"] == 4.0


def test_a_wrong_result_is_not_timed(timing):
    row = timing.measure(a_cell(timing, wrong=True), timing.Settings())
    assert row["batch"] == 1 and "us" not in row
    assert "liveweight is wrong by" in row["failed"]


def test_geometric_mean(timing):
    assert timing.geometric_mean([1.0, 4.0, 2.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no values"):
        timing.geometric_mean([])


@dataclasses.dataclass
class Drawn:
    """Stands in for a weight: the rows of a table without any tensor."""

    shape: tuple[int, ...]


def every_row(load, monkeypatch, settings) -> dict[str, list[dict]]:
    """Return the labels of all rows that the layer tables would measure."""
    linear, conv, nets = (load(f"cpu.{n}_cases") for n in ("linear", "conv", "net"))

    class Problem:
        def __init__(self, weight, labels, sparse=True):
            self.weight = weight
            self.labels = {"shape": "x".join(map(str, weight.shape)), **labels}

        def cell(self, batch, *_, **__):
            return {**self.labels, "batch": batch}

    def measured(cell, *_, **__):
        return {**cell, "torch": 1.0, "dense": 2.0, "sparse": 3.0, "peak": 0.5}

    monkeypatch.setattr(linear, "Problem", Problem)
    monkeypatch.setattr(linear, "pruned_linear", lambda *shape: Drawn(shape[:2]))
    monkeypatch.setattr(linear, "pruned_blocks", lambda shape, *_: Drawn(shape))
    monkeypatch.setattr(conv, "pruned", lambda *_: None)
    monkeypatch.setattr(conv, "cell", lambda name, layer, weight, ours, batch, sparsity, *_: {
        "layer": name, "batch": batch, "sparsity": sparsity})  # fmt: skip
    for module in (linear, conv):
        monkeypatch.setattr(module, "measure", measured)
    for name in ("unstructured", "block"):
        monkeypatch.setattr(linear, name, lambda *_: None)
    for name in ("kernels_removed", "weights_removed"):
        monkeypatch.setattr(conv, name, lambda *_: None)
    tables = load("cpu.tables").TABLES
    wanted = ("linear", "linear_cold", "conv_kernelwise", "conv_unstructured", "pointwise")
    rows = {name: list(tables[name].rows(settings)) for name in wanted}
    names = ("net", "granularity", "sparsity", "batch", "threads")
    rows["nets"] = [
        {**dict(zip(names, case, strict=True)), "dense": 2.0, "two_cores": 1.9}
        for case in nets.cases(settings)
    ]
    return rows


def test_every_target_reads_rows_that_the_suite_measures(load, monkeypatch, timing):
    targets = load("cpu.targets")
    tables = every_row(load, monkeypatch, timing.Settings())
    tables["dlmc"] = [{"sparsity": s, "torch": 1.0, "dense": 1.0, "sparse": 1.0}
                      for s in (0.8, 0.9, 0.95)]  # fmt: skip
    tables["training"] = [{"torch": 3.0, "net": "4096-4096-4096-10", "sparsity": 0.9}]
    tables["memory"] = [{"limit": 0.63, "bytes": 0.6, "format": "unstructured"}]
    tables["nets"] = [{**row, "changed": 1} for row in tables["nets"]]
    run = load("run")
    tables["peers"] = [{**labels, "deepsparse": 1.0} for labels, _ in run.cases(quick=False)]
    judged = [targets.judge(t, targets.derived(tables)) for t in targets.all_targets()]
    missing = [v.target.case for v in judged if v.words == "not measured"]
    two_cores = "two cores against one, largest batch"
    assert missing == ([] if any(r["threads"] == 2 for r in tables["nets"]) else [two_cores])
    assert len(judged) > 80
    assert all(t.goal is None or t.goal > t.floor for t in targets.all_targets())


def test_whole_nets_go_on_where_a_run_was_stopped(load, monkeypatch, timing):
    net_cases, measured = load("cpu.net_cases"), []
    cells = [("LeNet-300-100", "weight", 0.9, batch, threads) for threads in (1, 2)
             for batch in (1, 32)]  # fmt: skip
    monkeypatch.setattr(net_cases, "cases", lambda settings: cells)
    monkeypatch.setattr(net_cases.CompiledDense, "get", lambda *_: None)
    monkeypatch.setattr(net_cases, "on_one_core", lambda model, x: "one core")
    names = ("net", "granularity", "sparsity", "batch", "threads")
    known = tuple(dict(zip(names, cell, strict=True)) for cell in cells[:2])

    def one_net(labels, model, x, dense, settings, threads, again, others):
        measured.append((labels["batch"], threads, others))
        return {**labels, "threads": threads}

    monkeypatch.setattr(net_cases, "one_net", one_net)
    before = torch.get_num_threads()
    rows = list(net_cases.whole_nets(timing.Settings(known=known)))
    torch.set_num_threads(before)
    assert [tuple(row[name] for name in names) for row in rows] == cells
    assert measured == [(1, 2, {}), (32, 2, {net_cases.ONE_CORE: "one core"})]


def test_what_is_left_of_a_net_without_its_layers(load):
    limits = load("cpu.net_limits")
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(),
                                torch.nn.Linear(12, 5)).eval()  # fmt: skip
    x = torch.randn(4, 2, 4, 4)
    with torch.no_grad():
        model[0].weight[0] = 0
        rest, want = limits.without_layers(model, x), model(x)
        assert torch.equal(rest(x), want) and type(model[0]) is torch.nn.Conv2d
        assert [type(m).__name__ for m in rest] == ["Stored", "ReLU", "Flatten", "Stored"]
        assert limits.useful_flops(model, x) == 2 * 4 * (2 * 2 * 9 * 4 + 60)


def test_the_worst_row_decides_and_a_miss_is_named(load):
    targets = load("cpu.targets")
    rows = [{"batch": b, "sparsity": 0.9, "dense": d} for b, d in ((1, 9.0), (8, 3.0), (32, 1.0))]
    target = targets.Target("case", "t", {"batch": (1, 8)}, "dense", 4.0, 8.0)
    verdict = targets.judge(target, {"t": rows})
    assert (verdict.measured, verdict.words, verdict.rows) == (3.0, "missed", 2)
    assert "batch 8" in verdict.worst
    mean = targets.judge(dataclasses.replace(target, how="mean"), {"t": rows})
    assert mean.measured == pytest.approx(27**0.5) and mean.words == "floor"
    assert targets.judge(target, {}).words == "not measured"
    rows[1]["dense"] = 8.5
    assert targets.judge(target, {"t": rows}).words == "goal"


def results() -> dict[str, dict]:
    row = {"shape": "4096x4096", "batch": 32, "threads": 1, "us": {"liveweight": 5.0},
           "ratios": {"F.linear": 6.0}, "torch": 6.0, "dense": 0.9, "sparse": None, "peak": 0.21,
           "busy": True}  # fmt: skip
    rows = [{**row, "sparsity": s} for s in (0.7, 0.9)]
    stamp = {"CPU": "X1", "commit": "abc"}
    return {"linear": {"machine": stamp, "rows": rows, "problems": ["stopped early"], "seconds": 3}}


def test_the_page_names_machine_losses_misses_and_gaps(load):
    text = load("cpu.page").page(results())
    assert "* CPU: X1" in text and "* commit: abc" in text
    assert "| 4096x4096 | 32 | 6.00 / **0.90** / - (21 %) | 6.00 / **0.90** / - (21 %) |" in text
    assert (
        "| unstructured 90 %, 4096x4096, batch 32 | torch call | 6 | 7 | 12 | **missed** |" in text
    )
    assert "Not complete: stopped early" in text and "Not run." in text
    assert "2 of 2 cells were disturbed by other programs" in text
    assert "benchmarks/peers/run.py" in text


def test_page_only_rebuilds_page_and_plots_from_json(load, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "linear.json").write_text(json.dumps(results()["linear"]))
    assert load("cpu.__main__").main(["--page-only", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "speedup.png").exists() and "speedup.png" in (
        tmp_path / "README.md"
    ).read_text()


@pytest.mark.skipif(not COMPILED, reason="the compiled CPU kernels are missing")
def test_one_command_measures_a_table_and_stamps_it(load, tmp_path, monkeypatch):
    suite, cases = load("cpu.__main__"), load("cpu.other_cases")
    monkeypatch.setattr(suite, "measure_peaks", lambda: {1: 100.0})
    monkeypatch.setenv("LIVEWEIGHT_DATA", str(tmp_path / "nowhere"))
    command = ["--quick", "--effort", "0.01", "--only", "activity,dlmc", "--out", str(tmp_path)]
    assert suite.main(command) == 0
    result = json.loads((tmp_path / "activity.json").read_text())
    assert result["rows"][0]["us"]["liveweight"] > 0 and result["machine"]["commit"]
    absent = json.loads((tmp_path / "dlmc.json").read_text())
    assert absent["rows"] == [] and cases.ARCHIVE in absent["problems"][0]
    with pytest.raises(ValueError, match="no table starts with"):
        suite.main(["--only", "lineer", "--out", str(tmp_path)])


@pytest.mark.skipif(not COMPILED, reason="the compiled CPU kernels are missing")
def test_the_machine_has_a_peak_and_a_bandwidth():
    assert torch.ops.liveweight.cpu_peak(1, 0.01) > 0.1
    assert torch.ops.liveweight.cpu_stream(1 << 16, 2, 0.01) > 0.1
    with pytest.raises(RuntimeError, match="expected threads >= 1, got 0"):
        torch.ops.liveweight.cpu_peak(0, 0.01)
    with pytest.raises(RuntimeError, match="at least 4096 bytes, got 8"):
        torch.ops.liveweight.cpu_stream(8, 1, 0.01)


def test_smtx_files_become_matrices(load):
    cases = load("cpu.other_cases")
    weight = cases.read_smtx("2, 4, 3\n0 1 3\n2 0 3 \n")
    assert (weight != 0).tolist() == [[False, False, True, False], [True, False, False, True]]
    with pytest.raises(ValueError, match="smtx"):
        cases.read_smtx("2, 4, 3\n0 1 2\n2 0 \n")


@pytest.mark.parametrize("name", ["LeNet-5", "ResNet-20"])
def test_random_masks_spare_the_first_convolution_and_the_classifier(load, name):
    nets = load("nets")
    model = nets.make(name, 0.9, "kernel")
    for path, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            density = float((layer.weight != 0).float().mean())
            assert density > 0.99 if path in nets.NETS[name].keep else abs(density - 0.1) < 0.01
            if path not in nets.NETS[name].keep and layer.weight.dim() == 4:
                kept = (layer.weight != 0).flatten(2)
                assert (kept.all(2) == kept.any(2)).all()


@pytest.mark.parametrize("name", ["LeNet-5", "ResNet-20", "encoder"])
def test_a_recipe_reads_only_what_it_has_written(load, tmp_path, name):
    nets, recipe = load("nets"), load("recipe")
    recipe.write(nets.make(name, 0.9), nets.example(name, 1), tmp_path)
    about = json.loads((tmp_path / "recipe.json").read_text())
    numpy = pytest.importorskip("numpy")
    known = {"x", *numpy.load(tmp_path / "weights.npz").files}
    for node in about["nodes"]:
        assert set(node["inputs"]) <= known, node
        known.add(node["output"])
    assert about["result"] in known and about["output"][0] == 1
    assert "BatchNormalization" not in {node["op"] for node in about["nodes"]}
