from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveweight.runs.target.search import Search, falling


def find(cost, target, dense=None, **options):
    """Run a search over a function of sparsity; return it and what it asked for."""
    search = Search(target, cost(0.0) if dense is None else dense, **options)
    asked = []
    while (sparsity := search.ask()) is not None:
        asked.append(sparsity)
        search.tell(sparsity, cost(sparsity))
        assert len(asked) <= search.most
    return search, asked


COSTS = st.lists(st.floats(0, 100), min_size=1, max_size=9)


@given(COSTS)
def test_falling_is_the_nearest_sequence_that_never_rises(costs):
    def mean(a, b):
        return sum(costs[a : b + 1]) / (b + 1 - a)

    n = len(costs)
    want = [min(max(mean(a, b) for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
    assert falling(costs) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("power", [1, 2, 3, 0.5])
@pytest.mark.parametrize("rest", [0, 0.1])
def test_a_smooth_cost_takes_few_trials(share, power, rest):
    def cost(s):
        return 1000 * (rest + (1 - rest) * (1 - s) ** power)

    target = 1000 * share
    search, asked = find(cost, target)
    assert 0.98 * target <= cost(search.best) <= target
    assert len(asked) <= (7 if rest else 3)
    assert search.stopped == "within 2% of the target"


def test_a_good_first_guess_is_enough():
    search, asked = find(lambda s: 1 - s**3, 0.5, first=0.7944)
    assert asked == [0.7944]
    assert search.best == 0.7944


def test_of_a_staircase_the_least_step_that_meets_the_target_is_found():
    edges = (0.2, 0.45, 0.7, 0.9)
    search, _ = find(lambda s: 100 - 20 * sum(s >= e for e in edges), 50.0)
    assert search.best == pytest.approx(0.7, abs=1e-4)
    assert search.best >= 0.7
    assert search.stopped == "a little less sparsity misses the target"


def test_a_target_out_of_reach_ends_at_the_highest_sparsity():
    search, asked = find(lambda s: 1 - s / 2, 0.4, highest=0.95)
    assert search.best is None
    assert asked[-1] == 0.95 and len(asked) == 3
    assert search.stopped == "the target is out of reach at sparsity 0.95"


def test_a_model_that_is_cut_through_meets_no_target():
    def cost(s):
        return math.inf if s > 0.6 else 1 - s

    search, _ = find(cost, 0.45)
    assert 0.55 <= search.best <= 0.6
    search, _ = find(cost, 0.2)
    assert search.best is None
    assert "nothing of the input gets through" in search.stopped


def test_nothing_is_tried_twice_where_dense_is_cheap_enough():
    search, asked = find(lambda s: 10 * (1 - s), 20.0)
    assert asked == [0.0]
    assert search.best == 0.0


def test_a_target_that_is_met_with_nothing_pruned_takes_three_trials():
    search, asked = find(lambda s: 40 * (1 - s), 50.0, dense=100.0)
    assert len(asked) == 3 and asked[-1] == search.best == 0.0
    assert search.stopped == "nothing more has to go"


def test_a_plateau_below_dense_is_told_from_the_target():
    """Compressing alone takes a third; pruning must do the rest."""
    search, asked = find(lambda s: 66 * (1 - s) if s else 66.0, 50.0, dense=100.0)
    assert 66 * (1 - search.best) == pytest.approx(49.5, abs=0.5)
    assert len(asked) <= 5


def test_noise_does_not_keep_it_from_ending_near_the_target():
    for seed in range(20):
        noise = random.Random(seed)
        search, asked = find(
            lambda s, noise=noise: (0.1 + 0.9 * (1 - s)) * noise.uniform(0.95, 1.05),
            0.4,
            dense=1.0,
            resolution=5e-3,
        )
        assert len(asked) <= 16
        assert 0.1 + 0.9 * (1 - search.best) == pytest.approx(0.4, rel=0.08)


@given(
    st.integers(0, 10**6),
    st.floats(1e-3, 2),
    st.floats(0.3, 1),
    st.integers(1, 25),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.floats(0, 1),
)
def test_whatever_the_cost_it_ends_and_what_it_returns_was_seen(
    seed, target, highest, most, tolerance, cut
):
    noise = random.Random(seed)
    seen = {}

    def cost(s):
        seen[s] = math.inf if s > cut else noise.random()
        return seen[s]

    options = {"highest": highest, "most": most, "tolerance": tolerance}
    search, asked = find(cost, target, dense=1.0, **options)
    assert len(set(asked)) == len(asked) <= most
    assert all(0 <= s <= highest for s in asked)
    assert search.stopped
    assert search.best is None or seen[search.best] <= target
