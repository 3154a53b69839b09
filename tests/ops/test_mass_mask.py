"""mass_mask: exact agreement with a sort in both tie modes, its promise on any floats, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from liveweight import reference
from liveweight.ops import mass_mask

ALPHAS = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.9, 0.95, 1.0]), st.floats(0, 1))
TIES = ["stable", "authors"]
op = torch.ops.liveweight.mass_mask.default


def by_hand(scores: list[float], alpha: float, ties: str) -> list[bool]:
    """The rule, spelled out with Python numbers; exact for scores that are small integers."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept, mass = 0, 0.0
    limit = alpha * sum(scores)
    if ties == "authors":  # float32, as in their program
        limit = float(torch.tensor(alpha) * torch.tensor(float(sum(scores))))
    for i in order:
        if mass >= limit if alpha < 1 else scores[i] == 0:
            break
        mass += scores[i]
        kept += 1
    if ties == "stable":
        return [i in order[:kept] for i in range(len(scores))]
    first_dropped = order[min(max(kept, 1), len(scores) - 1)]
    return [score > scores[first_dropped] for score in scores]


@pytest.mark.parametrize("ties", TIES)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), ALPHAS, st.integers(-100, 60))
@example([0] * 7, 0.5, 0)
@example([3] * 40, 0.6, 0)
@example([5], 0.9, 0)
@example([0], 1.0, 0)
@settings(max_examples=200, deadline=None)
def test_integer_scores_agree_exactly(ties, scores, alpha, exponent):
    row = torch.tensor([scores], dtype=torch.float32) * 2.0**exponent
    wanted = by_hand(scores, alpha, ties)
    assert mass_mask(row, alpha, ties=ties)[0].tolist() == wanted
    assert reference.mass_mask(row, alpha, ties == "authors")[0].tolist() == wanted


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 2), (17, 63), (3, 129), (5, 4097), (0, 5), (4, 0)])
def test_matches_the_reference(shape, alpha, ties):
    for top in (2, 50, 2**15):
        scores = torch.randint(0, top, shape).float()
        mask = mass_mask(scores, alpha, ties=ties)
        assert mask.dtype == torch.bool
        assert mask.shape == shape
        assert torch.equal(mask, reference.mass_mask(scores, alpha, ties == "authors"))


@given(
    st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=80),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
)
@settings(max_examples=200, deadline=None)
def test_keeps_the_smallest_sufficient_set(scores, alpha):
    row = torch.tensor([scores], dtype=torch.float32)
    keep = mass_mask(row, alpha)[0]
    kept = sorted(row[0][keep].double().tolist())
    dropped = row[0][~keep].double().tolist()
    total = math.fsum(row[0].double().tolist())
    slack = total * 1e-14  # rounding of sums in float64
    assert math.fsum(kept) >= alpha * total - slack
    if kept:
        assert kept[0] > 0
        assert math.fsum(kept[1:]) < alpha * total + slack
        assert not dropped or max(dropped) <= kept[0]


@pytest.mark.parametrize("n", [300, 4096, 50000])
def test_large_rows_of_floats(n):
    scores = (torch.randn(4, n) * torch.rand(n) ** 3).abs()
    for alpha in (0.5, 0.95, 0.9999):
        keep = mass_mask(scores, alpha)
        total = scores.double().sum(1)
        kept = (scores * keep).double().sum(1)
        smallest = torch.where(keep, scores, torch.inf).amin(1).double()
        assert bool((kept >= alpha * total * (1 - 1e-12)).all())
        assert bool((kept - smallest < alpha * total * (1 + 1e-12)).all())
        assert bool((torch.where(keep, 0, scores).amax(1) <= smallest).all())


def test_documented_cases():
    equal = torch.ones(1, 5)
    assert mass_mask(equal, 0.6).tolist() == [[True, True, True, False, False]]
    assert not mass_mask(equal, 0.6, ties="authors").any()
    single = torch.tensor([[2.0]])
    assert mass_mask(single, 0.9).all()
    assert not mass_mask(single, 0.9, ties="authors").any()
    # The published code keeps all but the smallest where the paper keeps everything.
    steps = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert mass_mask(steps, 0.95).all()
    assert mass_mask(steps, 0.95, ties="authors").tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("n", [1, 5, 1000])
def test_the_ends_of_alpha(n):
    scores = torch.randint(0, 3, (6, n)).float()
    scores[0] = 0
    assert not mass_mask(scores, 0.0).any()
    assert torch.equal(mass_mask(scores, 1.0), scores > 0)
    # Sums of very different sizes: one float64 sum in any order would lose the small ones.
    wide = torch.tensor([[1e30, 1e-30, 0.0, 1.0]])
    assert mass_mask(wide, 1.0).tolist() == [[True, True, False, True]]


def test_negative_zero_is_zero():
    scores = torch.tensor([[-0.0, 1.0, 0.0], [-0.0, -0.0, -0.0]])
    assert mass_mask(scores, 1.0).tolist() == [[False, True, False], [False] * 3]


def test_subnormal_and_huge_scores():
    for scale in (1e-45, 1e-40, 1e38):
        scores = torch.tensor([[3.0, 1.0, 2.0]]) * scale
        assert mass_mask(scores, 0.5).tolist() == [[True, False, False]]


def test_sums_beyond_float32_reach_infinity_in_the_authors_program():
    for row in ([3e38] * 4 + [1e38, 2e38], [3e38, 2e38, 1e38, 1.0], [3.4028234e38, 1e31, 1.0]):
        scores = torch.tensor([row])
        for alpha in (0.0, 0.2, 0.9, 1.0):
            want = reference.mass_mask(scores, alpha, True)
            assert torch.equal(mass_mask(scores, alpha, ties="authors"), want)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 63])
def test_bad_scores_name_the_row(bad, row):
    scores = torch.rand(64, 1000)
    scores[row:, 7] = bad
    for run in (mass_mask, lambda s, alpha: reference.mass_mask(s, alpha, False)):
        with pytest.raises(ValueError, match=rf"scores must be finite and >= 0, row {row} holds"):
            run(scores, 0.9)


def test_bad_scores_are_found_at_any_alpha():
    scores = torch.tensor([[1.0, -1.0]])
    for alpha in (0.0, 1.0):
        with pytest.raises(ValueError, match="row 0"):
            mass_mask(scores, alpha)


def test_any_strides():
    scores = torch.rand(40, 30)
    assert torch.equal(mass_mask(scores.t(), 0.8), mass_mask(scores.t().contiguous(), 0.8))
    assert torch.equal(mass_mask(scores[:, ::3], 0.8), mass_mask(scores[:, ::3].clone(), 0.8))


def test_results_do_not_depend_on_threads():
    scores, threads = torch.rand(100, 3000), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = mass_mask(scores, 0.9)
        torch.set_num_threads(2)
        assert torch.equal(mass_mask(scores, 0.9), one)
    finally:
        torch.set_num_threads(threads)


def test_opcheck():
    for shape in [(5, 17), (0, 3), (3, 0)]:
        torch.library.opcheck(op, (torch.rand(shape), 0.9, False))


def test_compiles_into_one_graph():
    def prune(weight):
        return weight * mass_mask(weight.abs(), 0.9)

    weight = torch.randn(9, 33)
    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), prune(weight))


def test_wrong_arguments():
    scores = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"scores must have 2 dimensions, got shape \(4,\)"):
        mass_mask(scores[0], 0.5)
    with pytest.raises(TypeError, match="scores must be float32, got float64"):
        mass_mask(scores.double(), 0.5)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        mass_mask(scores, 1.5)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got nan"):
        mass_mask(scores, float("nan"))
    with pytest.raises(TypeError, match="alpha must be a number"):
        mass_mask(scores, "0.5")
    with pytest.raises(ValueError, match='ties must be "stable" or "authors", got \'random\''):
        mass_mask(scores, 0.5, ties="random")
