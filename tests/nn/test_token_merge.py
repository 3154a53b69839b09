"""TokenMerge against a loop over samples and tokens."""

from __future__ import annotations

import pytest
import torch

from liveweight.nn import TokenMerge
from liveweight.nn.token_merge import size_bias


def loop(x, metric, size, r, protect):
    """Merge one sample [T, D] as the text says: sort the even tokens, average groups."""
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    edges = []
    for i in even:
        likeness = [float(unit[i] @ unit[j]) for j in odd]
        best = max(range(len(odd)), key=lambda k: likeness[k])
        edges.append((-torch.inf if protect and i == 0 else likeness[best], i, odd[best]))
    goes = {i: j for _, i, j in sorted(edges, key=lambda e: -e[0])[:r]}
    groups = [[i] for i in even if i not in goes]
    groups += [[j] + [i for i in goes if goes[i] == j] for j in odd]
    sizes = torch.stack([size[g].sum() for g in groups])
    means = torch.stack([(size[g][:, None] * x[g]).sum(0) / size[g].sum() for g in groups])
    return means, sizes


@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.parametrize(("tokens", "r"), [(17, 8), (17, 3), (16, 7), (9, 1), (2, 0)])
def test_tokens_are_those_of_the_loop(tokens, r, protect):
    x, metric = torch.randn(3, tokens, 5), torch.randn(3, tokens, 4)
    size = torch.randint(1, 5, (3, tokens)).float()
    found, sizes = TokenMerge(r, protect_first=protect)(x, metric, size)
    for i in range(3):
        expected, counts = loop(x[i], metric[i], size[i], r, protect)
        torch.testing.assert_close(found[i], expected)
        assert torch.equal(sizes[i], counts)


@pytest.mark.parametrize(
    ("options", "tokens", "left"),
    [
        ({"r": 100}, 17, 9),  # at most half of the tokens that may go
        ({"r": 100, "protect_first": False}, 17, 9),
        ({"r": 100, "protect_first": False}, 16, 8),
        ({"ratio": 0.5}, 65, 33),
        ({"ratio": 0.25}, 17, 13),
        ({"ratio": 0.3}, 11, 8),  # 0.3 * 10 is 3, not 2.99...
        ({"ratio": 0.0}, 17, 17),
        ({"r": 3}, 1, 1),
        ({"r": 3}, 0, 0),
    ],
)
def test_how_many_are_left_and_sizes_sum_to_all_tokens(options, tokens, left):
    merge = TokenMerge(**options)
    x, size = merge(torch.randn(2, tokens, 4))
    assert x.shape == (2, left, 4) and size.shape == (2, left)
    assert tokens - merge.merged(tokens) == left
    assert torch.equal(size.sum(1), torch.full((2,), float(tokens)))


def test_the_first_token_stays_as_it_is_even_among_equals():
    x = torch.ones(1, 9, 3)
    x[0, 0] = 7.0
    out, size = TokenMerge(4)(x, torch.ones(1, 9, 2))
    assert torch.equal(out[0, 0], x[0, 0]) and size[0, 0] == 1


def test_equal_tokens_keep_their_value_and_sums_are_kept():
    one = torch.randn(1, 1, 6)
    out, _ = TokenMerge(ratio=0.5)(one.expand(2, 9, 6))
    torch.testing.assert_close(out, one.expand(2, 5, 6))
    x = torch.randn(2, 17, 6)
    out, size = TokenMerge(r=5)(x)
    torch.testing.assert_close((out * size[..., None]).sum(1), x.sum(1))


def test_merging_twice_counts_what_was_merged_before():
    x = torch.randn(2, 17, 6)
    merge = TokenMerge(r=5)
    out, size = merge(*(lambda y, s: (y, None, s))(*merge(x)))
    assert out.shape == (2, 7, 6) and torch.equal(size.sum(1), torch.full((2,), 17.0))
    torch.testing.assert_close((out * size[..., None]).sum(1), x.sum(1))


def test_attention_with_the_bias_is_attention_over_the_tokens_that_were_merged():
    key, value, query = torch.randn(3, 1, 2, 4, 8)
    counts = torch.tensor([[1, 3, 2, 1]])
    merged = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=size_bias(counts.float())
    )
    many = [t.repeat_interleave(counts[0], dim=2) for t in (key, value)]
    torch.testing.assert_close(
        merged, torch.nn.functional.scaled_dot_product_attention(query, *many)
    )
    assert size_bias(None) is None


def test_gradients_are_those_of_the_averages():
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    metric = torch.randn(2, 7, 3, requires_grad=True)
    merge = TokenMerge(2)
    assert torch.autograd.gradcheck(lambda t: merge(t, metric)[0], (x,))
    merge(x, metric)[0].sum().backward()
    assert metric.grad is None


def test_bfloat16_keeps_its_dtype_and_exact_sizes():
    out, size = TokenMerge(ratio=0.5)(torch.randn(1, 9, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and size.dtype == torch.float32 and size.sum() == 9


def test_it_compiles_as_one_graph():
    merge, x = TokenMerge(ratio=0.5), torch.randn(2, 17, 6, requires_grad=True)
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x), merge(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    (grad,) = torch.autograd.grad(compiled(x)[0].square().sum(), x)
    (expected,) = torch.autograd.grad(merge(x)[0].square().sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either r or ratio, got r=None, ratio=None"),
        ({"r": 1, "ratio": 0.1}, "give either r or ratio, got r=1, ratio=0.1"),
        ({"r": -1}, "r must be a whole number of at least 0, got -1"),
        ({"r": 1.5}, "r must be a whole number of at least 0, got 1.5"),
        ({"ratio": 0.6}, r"ratio must be in \[0, 0.5\], got 0.6"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        TokenMerge(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 4),), r"x must be \[N, T, D\], got \[3, 4\]"),
        ((torch.ones(2, 5, 4), torch.ones(2, 4, 4)), r"metric must be \[2, 5, K\] like x, got"),
        ((torch.ones(2, 5, 4), None, torch.ones(2, 4)), r"size must be \[2, 5\] like x, got"),
    ],
)
def test_shapes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenMerge(1)(*arguments)
