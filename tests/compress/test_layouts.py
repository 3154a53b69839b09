"""Layouts between neighbouring convolutions: tried on the whole model, kept where faster."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from liveweight.compress import compress_, load, save
from liveweight.compress.measure import Timings
from liveweight.nn import PackedConv2d


class LayoutClock:
    """Packed layers win; the whole model takes what its layouts say."""

    def __init__(self, times: dict[str, float], whole: float = 5.0) -> None:
        self.times, self.whole = times, whole
        self.asked: list[list[str]] = []

    def __call__(self, calls, *, prepare=None, **options):
        for name, call in calls.items():
            if prepare:
                prepare[name]()
            call()
        if "compressed" in calls:
            return Timings({"dense": [10.0] * 8, "compressed": [self.whole] * 8})
        if "layouts as they come" in calls:
            self.asked.append(list(calls))
            return Timings({name: [self.times.get(name, 10.0)] * 8 for name in calls})
        return Timings({n: [5.0 if "packed" in n else 10.0] * 8 for n in calls})


class ThreeConvs(nn.Module):
    """Three convolutions, the second with a residual add; reads a view of the last one."""

    def __init__(self, views: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(64, 3)
        self.views = views

    def forward(self, x):
        x = self.a(x)
        if self.views:
            x = x.view(x.shape[0], -1).view(x.shape)
        x = x + self.b(x)
        return self.head(torch.flatten(self.c(x), 1))


def compressed(model, clock, rows=2):
    model.eval()
    dense, x = copy.deepcopy(model), torch.randn(rows, 2, 4, 4)
    report = compress_(model, x, formats=["dense"], measure=clock)
    with torch.no_grad():
        assert torch.allclose(model(x), dense(x), atol=1e-5)
    return report


def test_the_fastest_layout_is_kept(tmp_path):
    model = ThreeConvs()
    report = compressed(model, LayoutClock({"channels_last throughout": 5.0}))
    assert [m.layout for m in (model.a, model.b, model.c)] == [
        "channels_last",
        "channels_last",
        "contiguous",
    ]
    assert report.layout == "channels_last"
    assert "convolutions hand over channels_last" in report.table()
    save(model, tmp_path / "net.safetensors")
    fresh = load(tmp_path / "net.safetensors", ThreeConvs()).eval()
    assert fresh.a.layout == "channels_last" and isinstance(fresh.a, PackedConv2d)
    x = torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_a_layout_that_gains_nothing_is_not_kept():
    model = ThreeConvs()
    clock = LayoutClock({"channels_last throughout": 9.95})
    report = compressed(model, clock)
    assert [m.layout for m in (model.a, model.b, model.c)] == [None] * 3
    assert report.layout is None and clock.asked


def test_neighbours_in_a_plain_chain():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten()
    )
    clock = LayoutClock({"channels_last between neighbours": 5.0})
    compressed(model, clock)
    assert (model[0].layout, model[2].layout) == ("channels_last", "contiguous")
    assert clock.asked == [["layouts as they come", "channels_last between neighbours"]]


def test_a_model_that_reads_strides_keeps_its_layout():
    model = ThreeConvs(views=True)
    clock = LayoutClock({"channels_last throughout": 1.0})
    report = compressed(model, clock)
    assert clock.asked == [] and report.layout is None and model.a.layout is None


def test_backing_off_takes_the_layouts_back():
    model = ThreeConvs()
    report = compressed(model, LayoutClock({"channels_last throughout": 5.0}, whole=20.0))
    assert report.changed == [] and report.layout is None
    assert type(model.a) is nn.Conv2d


@pytest.mark.parametrize("rows", [2, 16])
def test_batch_last_needs_sparse_layers_and_a_batch(nets, rows):
    model = nets.sparsify(ThreeConvs(), 0.3)
    clock = LayoutClock({})
    compressed(model, clock, rows=rows)
    assert all("batch_last" not in name for names in clock.asked for name in names)
