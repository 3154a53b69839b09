"""activity_stats_: values against float64, layouts, edge cases, threads, compilation, errors."""

from __future__ import annotations

import pytest
import torch

from liveweight import reference
from liveweight.ops import activity_stats_, new_activity_stats

# Relative: fp32 sums of at most 256 terms, then float64. Counts and maxima are exact.
SUMS = {"rtol": 2e-6, "atol": 0.0}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
op = torch.ops.liveweight.activity_stats_.default


def exact(x: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """Statistics of x [N, F, P] in float64."""
    size = x.double().abs().movedim(1, 0).flatten(1)  # [F, N * P]
    top = size.amax(1) if size.shape[1] else size.new_zeros(size.shape[0])
    return torch.stack([size.sum(1), size.square().sum(1), (size > eps).double().sum(1), top])


def check(stats: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(stats[:2], wanted[:2], equal_nan=True, **SUMS)
    torch.testing.assert_close(stats[2:], wanted[2:], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (17, 63, 1), (300, 129, 1), (2000, 3, 1), (2, 2500, 1)]
    + [(5, 7, 2), (3, 100, 15), (9, 33, 16), (4, 65, 49), (2, 3, 1024), (2, 2, 9001)],
)
def test_values(shape, dtype):
    x = torch.randn(shape).to(dtype)
    x[torch.rand(shape) < 0.3] = 0
    stats = new_activity_stats(shape[1])
    op(stats, x, 0.5)
    check(stats, exact(x, 0.5))


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 5, 0), (0, 5, 1)])
def test_an_empty_batch_changes_nothing(shape):
    stats = torch.rand(4, 5, dtype=torch.float64)
    before = stats.clone()
    op(stats, torch.zeros(shape), 0.0)
    assert torch.equal(stats, before)


def test_no_features():
    stats = new_activity_stats(0)
    assert activity_stats_(stats, torch.zeros(3, 0)).shape == (4, 0)


def test_batches_add_up():
    x = torch.randn(50, 30)
    stats = new_activity_stats(30)
    for part in x.split(7):
        assert activity_stats_(stats, part) is stats
    check(stats, exact(x[:, :, None]))


@pytest.mark.parametrize("shape", [(9, 4, 1), (300, 4, 1), (9, 4, 20), (3, 4, 5000)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_stay_in_their_feature(shape, value):
    x = torch.rand(shape) + 0.1
    x[1, 2, 0] = value
    stats = new_activity_stats(4)
    op(stats, x, 0.0)
    others = [0, 1, 3]
    check(stats[:, others], exact(x)[:, others])
    for row in (0, 1, 3):
        assert not stats[row, 2].isfinite()
        assert stats[row, 2].isnan() == torch.tensor(value).isnan()
    op(stats, torch.rand(shape), 0.0)  # a later clean batch does not hide it
    assert not stats[3, 2].isfinite()


@pytest.mark.parametrize("shape", [(600, 5, 1), (20, 5, 9), (6, 5, 400)])
def test_sums_past_the_range_of_float32(shape):
    x = torch.rand(shape) * 1e38
    x[:, 3] = 1.0
    stats = new_activity_stats(5)
    op(stats, x, 0.0)
    check(stats, exact(x))


def test_long_sums_do_not_drift():
    x = torch.full((60000, 3), 0.1)
    stats = activity_stats_(new_activity_stats(3), x)
    torch.testing.assert_close(stats[0], x.double().sum(0), rtol=1e-6, atol=0)


def test_eps_is_compared_as_a_double():
    x = torch.tensor([[0.1, -0.1, 0.0]])
    tenth = float(x[0, 0])  # a little above 0.1
    assert activity_stats_(new_activity_stats(3), x, eps=0.1)[2].tolist() == [1, 1, 0]
    assert activity_stats_(new_activity_stats(3), x, eps=tenth)[2].tolist() == [0, 0, 0]


def test_per_feature_takes_any_leading_dimensions():
    x = torch.randn(3, 5, 4, 7)
    for same in (x, x.flatten(0, 2), x.transpose(0, 1)):
        check(activity_stats_(new_activity_stats(7), same), exact(x.reshape(-1, 7, 1)))
    vector = torch.randn(7)
    check(activity_stats_(new_activity_stats(7), vector), exact(vector[None, :, None]))


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 9), (5, 6, 8, 7), (2, 6, 3, 4, 5)])
def test_per_channel(shape):
    x = torch.randn(shape)
    wanted = exact(x.reshape(shape[0], 6, -1))
    check(activity_stats_(new_activity_stats(6), x, per="channel"), wanted)
    strided = torch.randn(*shape, 2)[..., 0].copy_(x)
    assert not strided.is_contiguous()
    check(activity_stats_(new_activity_stats(6), strided, per="channel"), wanted)


def test_channels_last_is_read_in_place():
    x = torch.randn(5, 6, 8, 7)
    last = x.to(memory_format=torch.channels_last)
    with torch.profiler.profile() as profile:
        stats = activity_stats_(new_activity_stats(6), last, per="channel")
    assert not {"aten::copy_", "aten::clone"} & {event.name for event in profile.events()}
    check(stats, exact(x.flatten(2)))


def test_per_map_keeps_the_logical_order():
    x = torch.randn(5, 3, 4, 6)
    wanted = exact(x.reshape(5, 72, 1))
    for same in (x, x.to(memory_format=torch.channels_last)):
        check(activity_stats_(new_activity_stats(72), same, per="map"), wanted)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (70, 5, 9), (9, 2, 3, 4, 5), (3, 40, 1, 33)])
def test_maps_whose_channels_lie_last_are_read_in_place(shape):
    x = torch.randn(shape)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    features = torch.Size(shape[1:]).numel()
    start = torch.rand(4, features, dtype=torch.float64)
    stats, turned = start.clone(), start.clone()
    activity_stats_(stats, x, per="map", eps=0.1)
    with torch.profiler.profile() as profile:
        activity_stats_(turned, last, per="map", eps=0.1)
    assert not {"aten::copy_", "aten::clone"} & {event.name for event in profile.events()}
    torch.testing.assert_close(turned, stats, rtol=1e-6, atol=0)
    again = start.clone()
    reference.activity_stats_(again, last.movedim(1, -1).reshape(shape[0], -1, 1), 0.1, shape[1])
    torch.testing.assert_close(again, stats, rtol=1e-6, atol=0)


def test_nan_and_larger_maxima_survive_turning():
    x = torch.ones(2, 2, 2, 3)
    x[0, 1, 0, 2] = float("nan")
    stats = new_activity_stats(12)
    stats[3, 0] = 5.0
    activity_stats_(stats, x.to(memory_format=torch.channels_last), per="map")
    assert stats[3].isnan().nonzero().tolist() == [[8]]
    assert stats[3, 0] == 5.0 and stats[3, 1] == 1.0
    activity_stats_(stats, torch.ones_like(x).to(memory_format=torch.channels_last), per="map")
    assert stats[3, 8].isnan()


@pytest.mark.parametrize("shape", [(3000, 70, 1), (40, 70, 49), (500, 2000, 1), (1, 2, 70000)])
def test_results_do_not_depend_on_threads(shape):
    x = torch.randn(shape)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(new_activity_stats(shape[1]))
            op(results[-1], x, 0.0)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", [(17, 9, 1), (3, 9, 20)])
def test_reference(shape):
    x = torch.randn(shape)
    stats = new_activity_stats(9)
    reference.activity_stats_(stats, x, 0.25)
    check(stats, exact(x, 0.25))


def test_opcheck():
    for shape in [(17, 9, 1), (3, 9, 20), (0, 9, 1)]:
        torch.library.opcheck(op, (new_activity_stats(9), torch.randn(shape), 0.5))
        torch.library.opcheck(op, (new_activity_stats(9), torch.randn(shape), 0.5, 3))


def test_compiles_into_one_graph():
    def step(stats, x):
        activity_stats_(stats, x.relu(), per="channel")
        return stats[0] * 2

    x = torch.randn(4, 3, 5, 5)
    stats, eager = new_activity_stats(3), new_activity_stats(3)
    wanted = step(eager, x)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(stats, x)
    assert torch.equal(got, wanted)
    assert torch.equal(stats, eager)


def test_takes_inputs_that_need_gradients():
    x = torch.randn(4, 3, requires_grad=True)
    assert not activity_stats_(new_activity_stats(3), x * 2).requires_grad


def test_wrong_arguments():
    stats, x = new_activity_stats(3), torch.randn(4, 3)
    with pytest.raises(TypeError, match="x must be float32, bfloat16, float16, got float64"):
        activity_stats_(stats, x.double())
    with pytest.raises(TypeError, match="stats must be float64, got float32"):
        activity_stats_(stats.float(), x)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        activity_stats_(stats, [1.0])
    with pytest.raises(ValueError, match=r"has 5 features per feature, so stats must be \[4, 5\]"):
        activity_stats_(stats, torch.randn(4, 5))
    with pytest.raises(ValueError, match='per must be "feature", "channel" or "map", got \'row\''):
        activity_stats_(stats, x, per="row")
    with pytest.raises(ValueError, match="eps must be finite and >= 0, got -1"):
        activity_stats_(stats, x, eps=-1.0)
    with pytest.raises(ValueError, match="eps must be finite and >= 0, got nan"):
        activity_stats_(stats, x, eps=float("nan"))
    with pytest.raises(ValueError, match=r"x must be \[N, C, ...\]"):
        activity_stats_(stats, torch.randn(3), per="channel")
    with pytest.raises(ValueError, match=r"x must be \[N, ...\]"):
        activity_stats_(stats, torch.randn(3), per="map")
    with pytest.raises(ValueError, match="got a scalar"):
        activity_stats_(stats, torch.tensor(1.0))
    with pytest.raises(ValueError, match="stats must be contiguous"):
        activity_stats_(torch.zeros(3, 4, dtype=torch.float64).t(), x)
    with pytest.raises(ValueError, match="features must be >= 0, got -1"):
        new_activity_stats(-1)
    assert stats.count_nonzero() == 0


def test_the_launcher_guards_memory():
    if not torch._C._dispatch_has_kernel_for_dispatch_key("liveweight::activity_stats_", "CPU"):
        pytest.skip("no compiled kernel")
    x = torch.randn(4, 3, 1)
    with pytest.raises(RuntimeError, match=r"expected stats \[4, 3\], got shape \[4, 2\]"):
        op(new_activity_stats(2), x, 0.0)
    with pytest.raises(RuntimeError, match=r"expected x \[N, F, P\], got shape \[4, 3\]"):
        op(new_activity_stats(3), x[:, :, 0], 0.0)
    with pytest.raises(RuntimeError, match="expected contiguous x"):
        op(new_activity_stats(3), torch.randn(3, 4, 1).transpose(0, 1), 0.0)
    with pytest.raises(RuntimeError, match="channels 0 or a divisor of the features, got 2 of 3"):
        op(new_activity_stats(3), x, 0.0, 2)
    with pytest.raises(RuntimeError, match="stats has the wrong dtype: expected Double, got Float"):
        op(new_activity_stats(3).float(), x, 0.0)
