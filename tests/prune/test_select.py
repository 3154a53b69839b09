from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from liveweight.prune.importances import LayerScore, Target
from liveweight.prune.select import Keep, parse_rule, select


def one_layer(scores, kernel=None, bias=None):
    """A target, its score and an all-alive keep for scores [out, in]."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    out, fan = scores.shape
    if kernel:
        module, kind, by = nn.Conv2d(fan, out, kernel), "conv", "kernel"
    else:
        module, kind, by = nn.Linear(fan, out), "linear", "weight"
    alive = Keep(torch.ones_like(scores, dtype=torch.bool), None)
    return Target("a", module, kind, by), LayerScore(scores, bias), alive


def run(scores, ties="stable", alive=None, **rule):
    target, score, full = one_layer(scores)
    return select({"a": score}, {"a": target}, {"a": alive or full}, parse_rule(**rule), ties)["a"]


small = st.integers(1, 6)
grid = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=36, max_size=36)


@settings(max_examples=60, deadline=None)
@given(rows=small, columns=small, values=grid, sparsity=st.floats(0, 1))
def test_sparsity_keeps_exactly_the_rounded_count_of_the_largest(rows, columns, values, sparsity):
    scores = torch.tensor(values[: rows * columns]).view(rows, columns)
    keep = run(scores, sparsity=sparsity).weight
    assert int(keep.sum()) == round((1 - sparsity) * rows * columns)
    if keep.any() and not keep.all():
        assert scores[keep].min() >= scores[~keep].max()
    assert torch.equal(keep, run(scores, sparsity=sparsity).weight)


@settings(max_examples=60, deadline=None)
@given(rows=small, columns=small, values=grid, alpha=st.floats(0.01, 1))
def test_alpha_keeps_the_smallest_set_that_reaches_it(rows, columns, values, alpha):
    scores = torch.tensor(values[: rows * columns]).double().view(rows, columns)
    keep = run(scores, alpha=alpha).weight
    kept, total = (scores * keep).sum(1), scores.sum(1)
    assert (kept >= alpha * total - 1e-9).all()
    for r in range(rows):
        if keep[r].any():
            assert kept[r] - scores[r][keep[r]].min() < alpha * total[r] + 1e-9
        else:
            assert total[r] == 0


@settings(max_examples=40, deadline=None)
@given(values=grid, first=st.floats(0, 1), second=st.floats(0, 1), seed=st.integers(0, 99))
def test_what_is_pruned_stays_pruned(values, first, second, seed):
    scores = torch.tensor(values).view(6, 6)
    alive = Keep(run(scores, sparsity=first).weight)
    again = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed))
    for rule in ({"sparsity": second}, {"alpha": second}):
        later = run(again, alive=alive, **rule).weight
        assert not (later & ~alive.weight).any()
        if "sparsity" in rule:
            assert int(later.sum()) == min(int(alive.weight.sum()), round((1 - second) * 36))


@settings(max_examples=40, deadline=None)
@given(values=grid, sparsity=st.floats(0, 1))
def test_global_scope_ranks_all_layers_together(values, sparsity):
    parts = {"a": torch.tensor(values[:12]).view(3, 4), "b": torch.tensor(values[12:36]).view(6, 4)}
    made = {n: one_layer(s) for n, s in parts.items()}
    targets, scores, alive = ({n: m[i] for n, m in made.items()} for i in range(3))
    kept = select(scores, targets, alive, parse_rule(None, sparsity, "global"))
    keep = torch.cat([kept[n].weight.flatten() for n in parts])
    flat = torch.cat([p.flatten() for p in parts.values()])
    assert int(keep.sum()) == round((1 - sparsity) * 36)
    if keep.any() and not keep.all():
        assert flat[keep].min() >= flat[~keep].max()


def test_ties_go_to_the_lower_index():
    assert run(torch.ones(2, 3), sparsity=0.5).weight.tolist() == [[True] * 3, [False] * 3]


def test_global_scope_counts_weights_not_kernels():
    conv, conv_score, conv_alive = one_layer([[4.0, 1.0]], kernel=3)  # 9 weights a kernel
    fc, fc_score, fc_alive = one_layer([[3.0, 2.0, 0.5, 0.1]])
    kept = select(
        {"conv": conv_score, "fc": fc_score}, {"conv": conv, "fc": fc},
        {"conv": conv_alive, "fc": fc_alive}, parse_rule(None, 0.5, "global"),
    )  # fmt: skip
    assert kept["conv"].weight.tolist() == [[True, False]]  # 9 + 2 of 22 weights
    assert kept["fc"].weight.tolist() == [[True, True, False, False]]


def test_the_bias_competes_where_it_is_scored():
    target, score, alive = one_layer([[3.0, 1.0]], bias=torch.tensor([6.0], dtype=torch.float64))
    alive.bias = torch.ones(1, dtype=torch.bool)
    keep = select({"a": score}, {"a": target}, {"a": alive}, parse_rule(0.6, None))["a"]
    assert keep.weight.tolist() == [[False, False]] and keep.bias.tolist() == [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None), "got neither"),
        ((0.5, 0.5), "got both"),
        ((1.5, None), r"alpha must be in \[0, 1\], got 1.5"),
        ((None, -0.1), r"sparsity must be in \[0, 1\], got -0.1"),
        (({"conv": 2.0}, None), r"alpha\['conv'\] must be in \[0, 1\]"),
        (({"cnov": 0.5}, None), "unknown kind 'cnov'.*did you mean 'conv'"),
        ((None, 0.5, "gloabl"), "scope must be one of.*did you mean 'global'"),
        ((0.5, None, "global"), "goes with sparsity"),
        ((float("nan"), None), r"alpha must be in \[0, 1\]"),
    ],
)
def test_bad_rules(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_rule(*arguments)


def test_a_rule_of_the_wrong_type():
    with pytest.raises(TypeError, match="alpha must be a number"):
        parse_rule("0.5", None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_scores_name_the_layer(bad):
    with pytest.raises(ValueError, match="layer 'a': scores must be finite and >= 0"):
        run([[1.0, bad]], sparsity=0.5)


def test_scores_of_the_wrong_shape_name_the_layer():
    target, _, alive = one_layer([[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"layer 'a'.*\[2, 1\], expected \[1, 2\]"):
        score = LayerScore(torch.ones(2, 1))
        select({"a": score}, {"a": target}, {"a": alive}, parse_rule(None, 0.5))
