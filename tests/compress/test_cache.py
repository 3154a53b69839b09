"""Measured choices are remembered per machine and layer; a bad file never hurts."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from liveweight.compress import cache, compress_
from liveweight.compress.cache import ChoiceCache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pair(nets):
    """Two equal models and an input."""
    model = nets.sparsify(nets.settle(nets.LeNet()), 0.2)
    return model, copy.deepcopy(model), torch.randn(2, 1, 16, 16)


def test_place(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, "off")
    assert cache.cache_path() is None
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    assert cache.cache_path() == tmp_path / "choices.json"
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_path() == tmp_path / "liveweight" / "choices.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_path() == tmp_path / ".cache" / "liveweight" / "choices.json"


def test_entries_last_and_merge(tmp_path):
    path = tmp_path / "deep" / "choices.json"
    first, second = ChoiceCache(path), ChoiceCache(path)
    first.put(["a", 1], {"x": 1})
    second.put(["b"], {"x": 2})
    assert first.write() == "" and second.write() == ""
    again = ChoiceCache(path)
    assert again.get(["a", 1]) == {"x": 1} and again.get(["b"]) == {"x": 2}
    assert again.get(["c"]) is None
    assert [p.name for p in path.parent.iterdir()] == ["choices.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"liveweight": 99}', '{"liveweight": 1, "entries": 3}', "\x00\xff"]
)
def test_damaged_and_foreign_files_count_as_empty(tmp_path, text):
    path = tmp_path / "choices.json"
    path.write_bytes(text.encode("latin-1"))
    found = ChoiceCache(path)
    assert found.get("a") is None
    found.put("a", {"x": 1})
    assert found.write() == "" and ChoiceCache(path).get("a") == {"x": 1}


def test_a_folder_that_cannot_be_written_is_only_noted(tmp_path):
    (tmp_path / "file").write_text("")
    found = ChoiceCache(tmp_path / "file" / "choices.json")
    found.put("a", {"x": 1})
    assert "was not written" in found.write()


def test_growth_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_MOST", 3)
    found = ChoiceCache(tmp_path / "choices.json")
    for i in range(5):
        found.put(i, {"x": i})
    found.write()
    again = ChoiceCache(tmp_path / "choices.json")
    assert [again.get(i) is not None for i in range(5)] == [False, False, True, True, True]


def test_a_hit_measures_no_layer_but_the_whole(nets, folder, pair):
    model, again, x = pair
    clock = nets.Clock(**nets.ALL_FASTER)
    first = compress_(model, x, measure=clock)
    assert clock.races and not any(row.cached for row in first.layers)
    clock = nets.Clock(whole=8.0, **nets.ALL_FASTER)
    second = compress_(again, x, measure=clock)
    assert clock.races == [] and second.speedup == 1.25
    assert all(row.cached and row.reason.endswith("cached") for row in second.layers)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert torch.allclose(again(x), model(x), atol=1e-5)
    assert [r.candidates for r in second.layers] == [r.candidates for r in first.layers]


def test_other_inputs_threads_and_rules_miss(nets, folder, pair):
    model, again, x = pair
    compress_(model, x, measure=nets.Clock(**nets.ALL_FASTER))
    for options in ({"example_inputs": torch.cat([x, x])}, {"min_speedup": 1.1}, {"cache": False}):
        clock = nets.Clock(**nets.ALL_FASTER)
        compress_(copy.deepcopy(again), **{"example_inputs": x, **options}, measure=clock)
        assert len(clock.races) == 4, options
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        clock = nets.Clock(**nets.ALL_FASTER)
        compress_(again, x, measure=clock)
        assert len(clock.races) == 4
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.pop("winner"),
        lambda entry: entry.update(winner="a format of tomorrow"),
        lambda entry: entry.update(speedup="fast"),
        lambda entry: entry.update(times_us={}),
        lambda entry: entry.update(speedups={"kernelwise+relu": -1.0}),
    ],
)
def test_entries_of_other_making_are_measured_anew(nets, folder, pair, damage):
    model, again, x = pair
    compress_(model, x, measure=nets.Clock(**nets.ALL_FASTER))
    path = folder / "choices.json"
    content = json.loads(path.read_text())
    for entry in content["entries"].values():
        damage(entry)
    path.write_text(json.dumps(content))
    clock = nets.Clock(**nets.ALL_FASTER)
    report = compress_(again, x, measure=clock)
    assert len(clock.races) == 4 and len(report.changed) == 4


def test_equal_layers_of_one_model_are_measured_once(nets):
    layer = nets.sparsify(nn.Linear(16, 16), 0.3)
    model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(6)))
    clock = nets.Clock(unstructured=5.0)
    report = compress_(model, torch.randn(2, 16), measure=clock)
    assert len(clock.races) == 1 and len(report.changed) == 6
    assert [row.cached for row in report.layers] == [False, *[True] * 5]
