from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from liveweight.prune import cluster_rows, prune_
from liveweight.prune.arrange import arrange, kept_by, row_view


def planted(rows, columns, group, seed=0, share=0.2):
    """Scores whose rows are large in the same columns, `group` rows at a time, then shuffled."""
    g = torch.Generator().manual_seed(seed)
    support = torch.rand(rows // group, columns, generator=g) < share
    support = support.repeat_interleave(group, 0)
    scores = torch.rand(rows, columns, generator=g) * (0.1 + 0.9 * support)
    return scores[torch.randperm(rows, generator=g)]


def mass(scores, height, width, sparsity):
    """What prune_ reports for blocks of a Linear with such weights."""
    layer = nn.Linear(scores.shape[1], scores.shape[0])
    layer.weight.data = scores.clone()
    how = {"importance": "magnitude", "granularity": "block", "block": (height, width)}
    return prune_(nn.Sequential(layer), sparsity=sparsity, **how).layers[0].kept_mass


def test_rows_that_belong_together_are_found():
    scores = planted(128, 96, 16)
    order = cluster_rows(scores, 16, sparsity=0.8)
    assert sorted(order.tolist()) == list(range(128))
    before, after = mass(scores, 16, 1, 0.8), mass(scores[order], 16, 1, 0.8)
    best = float(scores.flatten().topk(round(0.2 * scores.numel())).values.sum() / scores.sum())
    assert before < 0.6 * best and after > 0.95 * best


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20), columns=st.integers(1, 12), height=st.integers(1, 9),
    width=st.integers(1, 5), sparsity=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_an_order_is_a_permutation_that_keeps_no_less(rows, columns, height, width, sparsity, seed):
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 4
    order = cluster_rows(scores, height, width=width, sparsity=sparsity)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(rows))
    assert torch.equal(order, cluster_rows(scores, height, width=width, sparsity=sparsity))
    before, after = (mass(s, height, width, sparsity) for s in (scores, scores[order]))
    assert after >= before - 1e-6


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 7)])
def test_the_order_is_undone_at_the_output(shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 12), torch.randn(*shape)
    order = cluster_rows(planted(12, 7, 3), 3, sparsity=0.5)
    assert not torch.equal(order, torch.arange(12))
    z = F.linear(x, layer.weight[order], layer.bias[order])
    y = torch.empty_like(z)
    y[..., order] = z
    torch.testing.assert_close(y, layer(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z[..., order.argsort()], layer(x), rtol=1e-6, atol=1e-6)


def test_kernels_count_as_one_and_zeros_stay():
    scores = planted(32, 16, 8)
    spread = scores[:, :, None, None].expand(32, 16, 3, 3) / 9
    assert torch.equal(cluster_rows(scores, 8), cluster_rows(spread.contiguous(), 8))
    assert torch.equal(cluster_rows(torch.zeros(6, 4), 2), torch.arange(6))


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.ones(4), {}, "2 or 4 dimensions"),
        (-torch.ones(4, 4), {}, "finite and >= 0"),
        (torch.full((4, 4), torch.nan), {}, "finite and >= 0"),
        (torch.ones(4, 4), {"height": 0}, "height must be an int of at least 1"),
        (torch.ones(4, 4), {"width": 1.5}, "width must be an int of at least 1"),
        (torch.ones(4, 4), {"sparsity": 2.0}, r"sparsity must be in \[0, 1\]"),
    ],
)
def test_wrong_scores_and_sizes(scores, options, message):
    with pytest.raises(ValueError, match=message):
        cluster_rows(scores, **({"height": 2} | options))


def test_two_views_of_one_axis_share_the_order():
    first, second = planted(24, 10, 6, seed=1), planted(24, 8, 4, seed=2)
    views = [row_view(first, 6, 1, 0.2), row_view(second, 4, 2, 0.3)]
    present = torch.arange(24)
    order = arrange(views, present)
    assert sorted(order.tolist()) == list(range(24))
    assert kept_by(views, order) > kept_by(views, present)
