"""top_k_mask on the CPU: exact masks and tie order, sizes, packed bits, compilation, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveweight.ops import mass_mask, pack_mask_bits, top_k_mask, unpack_mask_bits

NUMBERS = st.one_of(st.integers(-3, 3).map(float), st.floats(allow_nan=False, width=32))
op = torch.ops.liveweight.top_k_mask.default


def by_hand(scores: list[float], k: int, sizes: list[int] | None = None) -> list[bool]:
    """The rule with Python's sort, which keeps equal scores in order."""
    sizes = [1] * len(scores) if sizes is None else sizes
    keep, left = [False] * len(scores), k
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if sizes[i] <= 0:
            continue
        left -= sizes[i]
        if left < 0:
            break
        keep[i] = True
    return keep


@given(st.lists(NUMBERS, min_size=1, max_size=40), st.integers(0, 45))
@settings(max_examples=100, deadline=None)
def test_keeps_the_largest_equal_ones_by_lower_index(scores, k):
    row = torch.tensor([scores], dtype=torch.float32)
    want = by_hand(row[0].tolist(), k)
    assert top_k_mask(row, k)[0].tolist() == want
    assert top_k_mask(row, k, scope="global")[0].tolist() == want
    assert top_k_mask(row.double().t(), k, scope="global")[:, 0].tolist() == want


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 9)), min_size=1, max_size=30),
    st.integers(0, 150),
)
@settings(max_examples=100, deadline=None)
def test_sizes_count_instead_of_ones(pairs, k):
    scores, sizes = (list(part) for part in zip(*pairs, strict=True))
    row = torch.tensor([scores], dtype=torch.float32)
    mask = top_k_mask(row, k, scope="global", sizes=torch.tensor([sizes]))
    assert mask[0].tolist() == by_hand(scores, k, sizes)


def test_scopes():
    scores = torch.tensor([[3.0, 1.0, 2.0], [9.0, 8.0, 7.0]])
    rows = [[True, False, True], [True, True, False]]
    assert top_k_mask(scores, 2).tolist() == rows
    assert top_k_mask(scores, 2, scope="global").tolist() == [[False] * 3, [True, True, False]]


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100])
def test_packed_bits_are_those_of_pack_mask_bits(columns):
    scores = torch.rand(5, columns)
    for scope in ("row", "global"):
        mask = top_k_mask(scores, columns // 2, scope=scope)
        bits = top_k_mask(scores, columns // 2, scope=scope, packed=True)
        assert torch.equal(bits, pack_mask_bits(mask))
    for ties in ("stable", "authors"):
        bits = mass_mask(scores, 0.8, ties=ties, packed=True)
        assert torch.equal(unpack_mask_bits(bits, columns), mass_mask(scores, 0.8, ties=ties))


def test_nothing_to_choose_from():
    for shape, words in [((0, 40), (0, 2)), ((3, 0), (3, 0))]:
        scores = torch.empty(shape)
        for scope in ("row", "global"):
            assert top_k_mask(scores, 2, scope=scope).shape == shape
            assert top_k_mask(scores, 2, scope=scope, packed=True).shape == words
        assert mass_mask(scores, 0.5, packed=True).shape == words


def test_any_strides():
    scores = torch.rand(40, 30)
    assert torch.equal(top_k_mask(scores.t(), 8), top_k_mask(scores.t().contiguous(), 8))


def test_opcheck():
    sizes = torch.randint(0, 3, (5, 17))
    for per_row, given_sizes, packed in [(True, None, False), (False, sizes, True)]:
        torch.library.opcheck(op, (torch.rand(5, 17), 4, per_row, given_sizes, packed))
    torch.library.opcheck(
        torch.ops.liveweight.mass_mask.default, (torch.rand(5, 17), 0.9, False, True)
    )


def test_compiles_into_one_graph():
    def prune(weight):
        return weight * top_k_mask(weight.abs(), 7), mass_mask(weight.abs(), 0.9, packed=True)

    weight = torch.randn(9, 33)
    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(weight), prune(weight), strict=True):
        assert torch.equal(got, want)


def test_wrong_arguments():
    scores = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"scores must have 2 dimensions, got shape \(4,\)"):
        top_k_mask(scores[0], 1)
    with pytest.raises(TypeError, match="scores must be float32, got float64"):
        top_k_mask(scores.double(), 1)
    with pytest.raises(TypeError, match="scores must be float32, float64, got float16"):
        top_k_mask(scores.half(), 1, scope="global")
    with pytest.raises(TypeError, match="k must be a whole number, got float"):
        top_k_mask(scores, 1.0)
    with pytest.raises(ValueError, match="k must be >= 0, got -1"):
        top_k_mask(scores, -1)
    with pytest.raises(ValueError, match=r"scope must be one of \('row', 'global'\), got 'all'"):
        top_k_mask(scores, 1, scope="all")
    with pytest.raises(ValueError, match='sizes go with scope="global"'):
        top_k_mask(scores, 1, sizes=torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="sizes must be int64, got float32"):
        top_k_mask(scores, 1, scope="global", sizes=scores)
    with pytest.raises(ValueError, match=r"expected sizes \(3, 4\) like scores, got \(4,\)"):
        top_k_mask(scores, 1, scope="global", sizes=torch.ones(4, dtype=torch.int64))
    scores[1, 2] = float("nan")
    with pytest.raises(ValueError, match="scores must not be NaN, row 1 holds one"):
        top_k_mask(scores, 1)
