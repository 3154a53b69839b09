"""gram_norms_ in CUDA C++: its values, on the emulator and on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from liveweight import reference

# At most 48 products of a step and a few steps are added in float32, then 4 norms; the square root
# halves what its argument is off.
TOLERANCE = 64 * 2.0**-24


@dataclasses.dataclass(frozen=True)
class Case:
    """Gram matrices of n samples and `groups` times `inputs` channels; filters of all groups."""

    samples: int
    inputs: int
    filters: int
    taps: int
    groups: int = 1

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.samples + 7 * self.filters)
        entries = self.taps * (self.taps + 1) // 2
        size = (self.samples, self.inputs * self.groups, entries)
        gram = torch.rand(size, generator=generator)
        weight = torch.randn(self.filters, self.inputs, self.taps, generator=generator)
        sums = torch.rand(self.filters, self.inputs, generator=generator).double()
        return sums, gram, weight


CASES = [
    Case(1, 1, 1, 1),
    Case(1, 3, 5, 9),
    Case(5, 2, 70, 9),
    Case(65, 2, 3, 9),
    Case(200, 1, 65, 4),
    Case(3, 2, 6, 9, groups=3),
    Case(2, 1, 8, 9, groups=4),
    Case(17, 1, 4, 25),
    Case(2, 1, 3, 121),
]


def run(kernels, sums: torch.Tensor, gram: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    moved = [t.to(kernels.device, copy=True) for t in (sums, gram, weight)]
    kernels.op("gram_norms_")(*moved)
    return moved[0].cpu()


def expected(sums: torch.Tensor, gram: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    want = sums.clone()
    reference.gram_norms_(want, gram.double(), weight.double())
    return want


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gram_norms_equal_the_reference_in_every_order(kernels, case):
    tensors = case.tensors()
    want = expected(*tensors)
    for _ in kernels.orders():
        assert_close(run(kernels, *tensors), want)


@pytest.mark.sanitized
@pytest.mark.parametrize("case", CASES[:4] + CASES[5:6], ids=str)
def test_gram_norms_read_nothing_but_their_input(kernels, case):
    tensors = case.tensors()
    assert_close(run(kernels, *tensors), expected(*tensors))


@pytest.mark.parametrize("taps", [9, 49, 121])
def test_gram_norms_do_not_drift(kernels, taps):
    # Equal terms round alike, so that errors add up where they can.
    for value in (0.1, 0.7):
        gram = torch.full((2, 1, taps * (taps + 1) // 2), value)
        tensors = torch.zeros(1, 1, dtype=torch.float64), gram, torch.full((1, 1, taps), 0.9)
        assert_close(run(kernels, *tensors), expected(*tensors))


def test_gram_norms_need_every_barrier(kernels):
    cases = [Case(130, 1, 3, 25), Case(2, 1, 3, 9)]
    tensors = [case.tensors() for case in cases]
    want = [expected(*t) for t in tensors]

    def check():
        for t, w in zip(tensors, want, strict=True):
            assert_close(run(kernels, *t), w)

    kernels.assert_every_barrier_is_needed(check, "gram_norms.cuh")


def test_gram_norms_take_roots_of_every_magnitude(kernels):
    exponents = torch.arange(-126, 128, dtype=torch.float64)
    values = torch.cat([2.0**exponents, 1.7 * 2.0 ** exponents[:-1], torch.zeros(1)]).float()
    sums = torch.zeros(1, values.numel(), dtype=torch.float64)
    weight = torch.ones(1, values.numel(), 1)
    got = run(kernels, sums, values.reshape(1, -1, 1), weight)
    torch.testing.assert_close(got[0], values.double().sqrt(), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gram_norms_show_what_is_not_finite_where_it_is(kernels, value):
    sums, gram, weight = Case(3, 2, 4, 9).tensors()
    spoiled = gram.clone()
    spoiled[1, 0, 5] = value
    got = run(kernels, sums, spoiled, weight)
    assert not got[:, 0].isfinite().any()
    assert_close(got[:, 1], expected(sums, gram, weight)[:, 1])
    weight[2, 1, 3] = value
    got = run(kernels, sums, gram, weight)
    assert not got[2, 1].isfinite()
    assert got.isfinite().sum() == got.numel() - 1


def test_gram_norms_of_nothing_change_nothing(kernels):
    sums = torch.rand(4, 2, dtype=torch.float64)
    assert torch.equal(run(kernels, sums, torch.empty(0, 2, 45), torch.rand(4, 2, 9)), sums)
    none = run(kernels, sums[:0], torch.rand(3, 2, 45), torch.empty(0, 2, 9))
    assert none.shape == (0, 2)


def test_gram_norms_repeat_to_the_bit(kernels):
    tensors = Case(200, 2, 5, 9).tensors()
    results = [run(kernels, *tensors) for _ in kernels.orders()] + [run(kernels, *tensors)]
    assert all(torch.equal(r, results[0]) for r in results)


def test_gram_norms_refuse_what_does_not_fit(kernels):
    sums, gram, weight = (t.to(kernels.device) for t in Case(2, 3, 4, 9).tensors())
    op = kernels.op("gram_norms_")
    with pytest.raises(RuntimeError, match=r"gram_norms_: gram must be Float, got Double"):
        op(sums, gram.double(), weight)
    with pytest.raises(RuntimeError, match=r"gram_norms_: sums must have shape \[4, 3\]"):
        op(sums.t().contiguous(), gram, weight)
    with pytest.raises(RuntimeError, match="gram of 8 taps must have 36 entries, got 45"):
        op(sums, gram, weight[..., :8].contiguous())
    with pytest.raises(RuntimeError, match="gram has 2 channels, which weight's 3 per group"):
        op(sums, gram[:, :2].contiguous(), weight)


@pytest.mark.gpu
def test_gram_norms_run_in_a_cuda_graph(gpu):
    tensors = [t.to(gpu) for t in Case(300, 16, 64, 9).tensors()]
    op, before = torch.ops.liveweight.gram_norms_, tensors[0].clone()
    op(*tensors)
    first = tensors[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(*tensors)
    tensors[0].copy_(before)
    graph.replay()
    assert torch.equal(tensors[0], first)
