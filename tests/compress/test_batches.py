"""batch_sizes: one format for all where it serves, else a choice at run time; never slower."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from liveweight.compress import compress_, load, save
from liveweight.compress.batches import resize, resize_inputs, thresholds
from liveweight.compress.inputs import ExampleInputs
from liveweight.compress.measure import Timings
from liveweight.nn import ByBatch, PackedLinear, SparseLinear


class BatchClock:
    """Times by batch size and label; dense takes 10, what is not named 20; notes batch sizes."""

    def __init__(self, times: dict[int, dict[str, float]], whole: dict[int, float] | None = None):
        self.times, self.whole = times, whole or {}
        self.asked: list[int] = []

    def __call__(self, calls, *, prepare=None, **options):
        for name, call in calls.items():
            if prepare:
                prepare[name]()
            size = call().shape[0]
        self.asked.append(size)
        if "compressed" in calls:
            return Timings({"dense": [10.0] * 8, "compressed": [self.whole.get(size, 5.0)] * 8})
        times = {"dense": 10.0, **self.times[size]}
        return Timings({name: [times.get(name, 20.0)] * 8 for name in calls})


@pytest.fixture
def net(nets):
    return nets.sparsify(nets.settle(nn.Sequential(nn.Linear(12, 8), nn.ReLU())), 0.4)


SPARSE, PACKED = "unstructured+relu", "dense, packed+relu"


def test_one_winner_is_taken_as_it_is(net):
    clock = BatchClock({1: {SPARSE: 5.0}, 32: {SPARSE: 4.0}})
    report = compress_(net, torch.randn(4, 12), batch_sizes=[32, 1], measure=clock)
    assert isinstance(net[0], SparseLinear) and set(clock.asked) == {1, 32}
    assert report.layers[0].by_batch == {1: SPARSE, 32: SPARSE}
    assert report.layers[0].candidates[f"{SPARSE} @ 32"] == 4.0
    assert report.speedups == {1: 2.0, 32: 2.0} and "batch 32: 2.00x" in report.table()


def test_different_winners_dispatch(net, tmp_path):
    dense = copy.deepcopy(net)
    clock = BatchClock({1: {SPARSE: 20.0, PACKED: 5.0}, 32: {SPARSE: 2.0, PACKED: 8.0}})
    report = compress_(net, torch.randn(4, 12), batch_sizes=[1, 32], measure=clock)
    module = net[0]
    assert isinstance(module, ByBatch) and module.limits == (32**0.5,)
    assert [type(m) for m in module.choices] == [PackedLinear, SparseLinear]
    assert module.parts == ("0", "1") and type(net[1]) is nn.Identity
    row = report.layers[0]
    assert row.chosen == "by batch" and row.by_batch == {1: PACKED, 32: SPARSE}
    assert "2.00x at batch 1" in row.reason and "5.00x at batch 32" in row.reason
    again = compress_(net, torch.randn(4, 12), measure=clock)
    assert [r.reason for r in again.layers] == ["already by batch"]

    save(net, tmp_path / "net.safetensors")
    fresh = load(tmp_path / "net.safetensors", nn.Sequential(nn.Linear(12, 8), nn.ReLU()))
    assert isinstance(fresh[0], ByBatch) and fresh[0].limits == module.limits
    with torch.no_grad():
        for rows in (1, 3, 40):
            x = torch.randn(rows, 12)
            assert torch.allclose(net(x), dense(x), atol=1e-5)
            assert torch.equal(fresh(x), net(x))


def test_dense_serves_where_nothing_is_faster(net):
    dense = copy.deepcopy(net)
    clock = BatchClock({1: {}, 8: {SPARSE: 2.0}, 64: {}})
    compress_(net, torch.randn(8, 12), batch_sizes=[1, 8, 64], measure=clock)
    small, middle, large = net[0].choices
    assert small is large and isinstance(middle, SparseLinear)
    assert isinstance(small, PackedLinear) and not small.packs
    with torch.no_grad():
        for rows in (1, 9, 99):
            x = torch.randn(rows, 12)
            assert torch.allclose(net(x), dense(x), atol=1e-5)


def test_a_near_tie_takes_one_format(net):
    clock = BatchClock({1: {SPARSE: 5.1, PACKED: 5.0}, 32: {SPARSE: 2.0, PACKED: 8.0}})
    compress_(net, torch.randn(4, 12), batch_sizes=[1, 32], measure=clock)
    assert isinstance(net[0], SparseLinear)


def test_slower_at_one_size_is_undone(net):
    modules = list(net.modules())
    clock = BatchClock({1: {SPARSE: 5.0}, 32: {SPARSE: 5.0}}, whole={1: 12.0, 32: 4.0})
    report = compress_(net, torch.randn(4, 12), batch_sizes=[1, 32], measure=clock)
    assert list(net.modules()) == modules and report.speedup is None
    assert "0.83x" in report.layers[0].reason and report.layers[0].by_batch == {}


def test_dispatch_counts_rows_where_positions_are_folded_into_the_batch(nets):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nets.sparsify(nn.Linear(6, 6), 0.4)

        def forward(self, x):
            return self.fc(x.reshape(-1, 6)).view_as(x)

    model = Tokens().eval()
    times = {3: {"unstructured": 30.0, "dense, packed": 5.0}, 24: {"unstructured": 2.0}}
    clock = BatchClock({**times, 1: {}, 8: {}})
    compress_(model, torch.randn(2, 3, 6), batch_sizes=[1, 8], measure=clock)
    assert model.fc.limits == (pytest.approx(3 * 8**0.5),)


def test_resizing():
    x = torch.arange(12.0).view(4, 3)
    assert torch.equal(resize(x, 4, 2), x[:2])
    assert torch.equal(resize(x, 4, 10), torch.cat([x, x, x])[:10])
    assert torch.equal(resize(x, 2, 1), x[:2])
    assert resize(x, 3, 6) is x and resize(x, 4, 4) is x
    image = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert resize(image, 2, 5).is_contiguous(memory_format=torch.channels_last)
    inputs = resize_inputs(ExampleInputs((x,), {"mask": torch.ones(4), "flag": True}), 1)
    assert inputs.args[0].shape == (1, 3) and inputs.kwargs["mask"].shape == (1,)
    assert inputs.kwargs["flag"] is True
    assert thresholds([1, 4, 64]) == [2.0, 16.0]


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        (8, TypeError, "must be a list of whole numbers, got int"),
        ([1, 2.0], TypeError, "holds 2.0"),
        ([0], ValueError, "at least 1, got 0"),
        ([], ValueError, "batch_sizes is empty"),
    ],
)
def test_bad_sizes(net, sizes, error, words):
    with pytest.raises(error, match=words):
        compress_(net, torch.randn(2, 12), batch_sizes=sizes)
