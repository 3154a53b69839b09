"""On a GPU, what is faster than dense must be faster than torch.compile of dense too."""

from __future__ import annotations

import pytest
import torch

from liveweight.compress.compiled import LABEL, compile_strongest, confirm
from liveweight.compress.decide import Verdict
from liveweight.compress.measure import Timings

COST = {"dense": 10.0, "compiled": 8.0, "block": 4.0, "unstructured": 9.0}
SEEN = Verdict(
    "block", 2.5, "block is faster", {"dense": 10.0, "block": 4.0, "unstructured": 9.0},
    {"block": 2.5, "unstructured": 1.1},
)  # fmt: skip


def race(cost=None, seen=SEEN, make=None):
    cost = COST | (cost or {})

    def measure(rivals, budget):
        return Timings({name: [cost[call()]] * 5 for name, call in rivals.items()})

    calls = {name: lambda name=name: name for name in ("dense", "block", "unstructured")}
    make = make or (lambda call: lambda: "compiled")
    return confirm(seen, calls, measure, 1.0, 0.1, make)


def test_a_winner_that_beats_both_stays():
    verdict, note = race()
    assert (verdict.winner, verdict.speedup, note) == ("block", 2.5, "")
    assert "2.50x as fast as dense and 2.00x as fast as torch.compile of it" in verdict.reason
    assert verdict.times_us[LABEL] == 8.0 and verdict.times_us["dense"] == 10.0
    assert verdict.speedups == {"block": 2.5}  # the other one loses against the compiled layer


def test_a_compiled_layer_that_is_faster_keeps_the_layer_dense():
    verdict, note = race({"compiled": 3.0})
    assert (verdict.winner, verdict.speedup, verdict.speedups) == ("dense", 1.0, {})
    assert verdict.reason.startswith("with torch.compile dense is faster: block runs at 0.75x")
    assert verdict.times_us[LABEL] == 3.0 and note == ""


def test_nothing_is_compiled_where_dense_has_won():
    def never(call):
        raise AssertionError("compiled")

    seen = Verdict("dense", 1.0, "dense is faster", {"dense": 1.0, "block": 2.0})
    assert race(seen=seen, make=never) == (seen, "")


def test_a_compiler_that_fails_is_no_rival_and_is_named():
    def broken(call):
        raise RuntimeError("no Triton\nlong trace")

    verdict, note = race(make=broken)
    assert verdict is SEEN
    assert note == "torch.compile of a dense layer failed: RuntimeError: no Triton"


@pytest.mark.filterwarnings("ignore")
def test_many_layers_can_be_compiled_one_after_the_other():
    x, made = torch.randn(3, 4), []
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for size in range(1, 11):  # more than the compiler's own limit per function
        layer = torch.nn.Linear(4, size)

        def call(layer=layer):
            return layer(x)

        made.append((compile_strongest(call), call))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == len(made) == 10
    with torch.inference_mode():
        assert all(torch.allclose(fast(), call()) for fast, call in made)
