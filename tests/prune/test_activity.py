"""Observers: what they add up, what they forget, and that a CUDA graph can hold their updates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight.prune.activity import Activity, Alive
from liveweight.prune.kernel_response import MeanKernelNorms

SAMPLE = (3, 6, 5)
MAKERS = {
    "linear": lambda: Activity("linear"),
    "conv": lambda: Activity("conv"),
    "norms": lambda: MeanKernelNorms(nn.Conv2d(3, 4, 3)),
}


@pytest.fixture(params=MAKERS)
def seen(request):
    torch.manual_seed(1)
    return MAKERS[request.param]()


def test_batches_add_up_and_reset_forgets_them(seen):
    x = torch.randn(9, *SAMPLE)
    seen.update(torch.randn(2, *SAMPLE))
    sums = seen._sum if isinstance(seen, MeanKernelNorms) else seen._stats
    seen.reset()
    assert seen.samples == 0 and not seen.mean.any()
    seen.update(x[:4])
    seen.update(x[4:])
    assert seen.samples == (9 * 18 if seen.shape == (5,) else 9)
    whole = seen.mean
    assert sums is (seen._sum if isinstance(seen, MeanKernelNorms) else seen._stats)
    seen.reset()
    seen.update(x)
    torch.testing.assert_close(seen.mean, whole)
    if not isinstance(seen, MeanKernelNorms):
        wanted = x.double().abs().flatten(0, -2) if seen.shape == (5,) else x.double().abs()
        torch.testing.assert_close(whole, wanted.mean(0))


def test_samples_of_another_size_are_refused_and_change_nothing(seen):
    seen.update(torch.ones(2, *SAMPLE))
    before, samples = seen.mean, seen.samples
    with pytest.raises(ValueError, match=r"activations changed shape from \[.*5\] to \[.*4\]"):
        seen.update(torch.ones(2, 3, 6, 4))
    assert torch.equal(seen.mean, before) and seen.samples == samples


@pytest.mark.parametrize("activation", ["relu", None, "gelu"])
@pytest.mark.parametrize("dim", [-1, 1])
def test_units_are_alive_once_they_were(activation, dim):
    fn = {"relu": F.relu, "gelu": F.gelu, None: None}[activation]
    alive = Alive(activation, fn, dim)
    assert alive.alive is None
    shape = (4, 3) if dim == -1 else (4, 3, 2, 2)
    off = -1.0 if activation == "relu" else 0.0
    batches = [torch.full(shape, off) for _ in range(3)]
    batches[1][2, 1] = 0.5
    batches[2][:, 2] = float("nan")
    for batch, want in zip(batches, ([0, 0, 0], [0, 1, 0], [0, 1, 1]), strict=True):
        alive.update(batch[:0])
        alive.update(batch)
        assert alive.alive.tolist() == [bool(w) for w in want]
    alive.update(batches[0])
    assert alive.alive.tolist() == [False, True, True]
    alive.reset()
    alive.update(batches[1])
    assert alive.alive.tolist() == [False, True, False]


def _update_all(observers: list, x: torch.Tensor) -> None:
    for observer in observers:
        observer.update(x)


@pytest.mark.gpu
def test_updates_are_replayed_by_a_cuda_graph(gpu):
    conv = nn.Conv2d(3, 4, 3).to(gpu)
    observers = [Activity("linear"), Activity("conv"), MeanKernelNorms(conv)]
    alive = [Alive("relu", F.relu, 1), Alive(None, None, -1)]
    plain = [Activity("linear"), Activity("conv"), MeanKernelNorms(conv)]
    x = torch.zeros(7, *SAMPLE, device=gpu)
    first = pytest.raises(RuntimeError, match="first batch while a CUDA graph was captured")
    with first, torch.cuda.graph(torch.cuda.CUDAGraph()):
        observers[0].update(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _update_all([*observers, *alive], x)
    torch.cuda.current_stream().wait_stream(stream)
    for observer in [*observers, *alive]:
        observer.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _update_all([*observers, *alive], x)
    assert observers[0].samples == 0
    for _ in range(3):
        batch = torch.randn(7, *SAMPLE, device=gpu) - 3
        x.copy_(batch)
        graph.replay()
        _update_all(plain, batch)
    for replayed, direct in zip(observers, plain, strict=True):
        assert replayed.samples == direct.samples > 0
        assert torch.equal(replayed.mean, direct.mean)
    assert alive[1].alive.all()
