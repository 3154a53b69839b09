from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from liveweight.prune import NNRelief, masks, prune_, score
from liveweight.prune.importances import LayerScore, Target
from liveweight.prune.select import Keep, parse_rule, select
from liveweight.prune.structure import Blocks, Panels, kept_mass, parse_structure

DATA = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def rand(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def choose(scores, alive=None, block=None, pattern=None, **rule):
    """What select keeps of one layer with scores [out, in] or [out, in, r, s]."""
    out, fan, *kernel = scores.shape
    module = nn.Conv2d(fan, out, kernel) if kernel else nn.Linear(fan, out)
    target = Target("a", module, "conv" if kernel else "linear", "weight")
    structure = parse_structure("block" if block else "vnm", block, pattern)
    keep = Keep(torch.ones(scores.shape, dtype=torch.bool) if alive is None else alive)
    rule = parse_rule(**rule, structure=structure)
    return select({"a": LayerScore(scores)}, {"a": target}, {"a": keep}, rule)["a"].weight


def blocks_of(height, width, shape):
    """The slices of every block, row of blocks after row of blocks."""
    return [
        (slice(r, min(r + height, shape[0])), slice(c, min(c + width, shape[1])))
        for r in range(0, shape[0], height)
        for c in range(0, shape[1], width)
    ]


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(shape=sizes, block=sizes, sparsity=st.floats(0, 1), seed=st.integers(0, 99))
def test_sparsity_keeps_whole_blocks_of_the_largest_mean_score(shape, block, sparsity, seed):
    scores = rand(seed, *shape)
    keep = choose(scores, block=block, sparsity=sparsity)
    places = blocks_of(*block, shape)
    kept = [bool(keep[place].all()) for place in places]
    assert all(k or not keep[place].any() for k, place in zip(kept, places, strict=True))
    means = [float(scores[place].double().mean()) for place in places]
    assert min([m for m, k in zip(means, kept, strict=True) if k], default=1) >= max(
        [m for m, k in zip(means, kept, strict=True) if not k], default=0
    )
    budget = round((1 - sparsity) * scores.numel())
    if sparsity == 1:
        assert not keep.any()
    elif sum(kept) > 1:
        assert int(keep.sum()) <= budget
    else:
        assert sum(kept) == 1  # a layer stays connected
    if not all(kept):  # and the next best block would have been too much
        left = [p for p, k in zip(places, kept, strict=True) if not k]
        best = max(left, key=lambda p: float(scores[p].double().mean()))
        assert sparsity == 1 or int(keep.sum()) + scores[best].numel() > budget


@settings(max_examples=60, deadline=None)
@given(shape=sizes, block=sizes, alpha=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_alpha_keeps_the_fewest_blocks_of_every_row_of_blocks(shape, block, alpha, seed):
    scores = rand(seed, *shape)
    keep = choose(scores, block=block, alpha=alpha)
    for first in range(0, shape[0], block[0]):
        rows = slice(first, first + block[0])
        places = [p for p in blocks_of(*block, shape) if p[0].start == first]
        sums = sorted((float(scores[p].double().sum()) for p in places), reverse=True)
        kept = [bool(keep[p].all()) for p in places]
        assert int(keep[rows].sum()) == sum(
            scores[p].numel() for p, k in zip(places, kept, strict=True) if k
        )
        wanted = alpha * sum(sums)
        held = float((scores * keep)[rows].double().sum())
        assert held >= wanted - 1e-5
        assert sum(sums[: sum(kept) - 1]) <= wanted + 1e-5
        assert held == pytest.approx(sum(sums[: sum(kept)]))


def test_blocks_of_one_are_single_weights():
    scores = rand(3, 7, 5)
    one = choose(scores, block=(1, 1), sparsity=0.6)
    assert int(one.sum()) == 14 and scores[one].min() > scores[~one].max()


def test_blocks_of_a_convolution_hold_whole_kernels_and_sum_their_weights():
    scores = torch.zeros(4, 4, 3, 3)
    scores[2, 3, 1, 1] = 5.0
    scores[0:2, 0:2] = 0.5
    keep = choose(scores, block=(2, 2), sparsity=0.75)
    expected = torch.zeros(4, 4, 3, 3, dtype=torch.bool)
    expected[0:2, 0:2] = True  # 18 against 5
    assert torch.equal(keep, expected)


@settings(max_examples=40, deadline=None)
@given(shape=sizes, block=sizes, first=st.floats(0, 0.9), second=st.floats(0, 0.9))
def test_what_is_pruned_stays_pruned_and_does_not_count(shape, block, first, second):
    scores = rand(1, *shape)
    alive = rand(2, *shape) >= first
    keep = choose(rand(3, *shape), alive, block=block, sparsity=second)
    assert not (keep & ~alive).any()
    budget = round((1 - second) * scores.numel())
    places = [p for p in blocks_of(*block, shape) if keep[p].any()]
    assert int(keep.sum()) <= budget or len(places) == 1
    assert all(torch.equal(keep[p], alive[p]) for p in places)
    again = choose(rand(3, *shape), keep, block=block, sparsity=second)
    assert torch.equal(again, keep)


@pytest.mark.parametrize("importance", ["nnrelief", "magnitude", "random", "wanda", "lamp"])
@pytest.mark.parametrize("how", [{"sparsity": 0.6}, {"alpha": 0.7}])
def test_every_importance_prunes_blocks_of_both_kinds(nets, importance, how):
    model = nets.ConvNet()
    report = prune_(model, DATA, importance=importance, granularity="block", block=(2, 2), **how)
    found = masks(model)
    for row in report.layers:
        mask = found[f"{row.name}.weight"]
        kept = Blocks(2, 2).sums(mask)
        mask = mask if mask.dim() == 2 else mask.flatten(2).any(2) & mask.flatten(2).all(2)
        live = mask.any(1, keepdim=True) & mask.any(0, keepdim=True)  # dead units are cut from it
        whole = Blocks(2, 2).spread(kept > 0, mask.shape)
        assert torch.equal(mask, whole & live) or torch.equal(mask, whole)
        assert row.granularity == "block 2x2" and row.kept <= row.total
        assert 0 < row.kept_mass <= row.best_mass + 1e-9 <= 1 + 1e-8
    table = report.table()
    assert report.kept < report.total
    assert "mass" in table and "best" in table
    row = json.loads(report.to_json())["layers"][0]
    assert row["kept_mass"] == report.layers[0].kept_mass


def test_reported_masses_are_shares_of_the_scores():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    scores = model[0].weight.detach().abs().double()
    report = prune_(model, importance="magnitude", granularity="block", block=(3, 4), sparsity=0.5)
    mask = masks(model)["0.weight"]
    row = report.layers[0]
    assert row.kept == 24
    assert row.kept_mass == pytest.approx(float(scores[mask].sum() / scores.sum()))
    best = scores.flatten().sort(descending=True).values[:24].sum() / scores.sum()
    assert row.best_mass == pytest.approx(float(best))
    single = prune_(model, importance="magnitude", sparsity=0.6)
    assert single.layers[0].kept_mass is None and "mass" not in single.table()


def test_kept_mass_of_nothing():
    assert kept_mass(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool)) == (1.0, 1.0)
    assert kept_mass(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)) == (0.0, 0.0)


def test_blocks_compete_over_the_whole_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.fill_(2.0)
    kept = {"importance": "magnitude", "granularity": "block", "block": (4, 4), "scope": "global"}
    report = prune_(model, sparsity=0.5, **kept)
    assert [r.kept for r in report.layers] == [0, 64]


def test_a_layer_smaller_than_its_share_keeps_one_block_and_says_so():
    model = nn.Sequential(nn.Linear(4, 4))
    report = prune_(model, importance="magnitude", granularity="block", block=(4, 2), sparsity=0.9)
    assert report.layers[0].kept == 8
    assert report.layers[0].note == "one block is the least that a layer keeps"


def test_sizes_by_kind_leave_the_other_kind_alone(nets):
    model = nets.ConvNet()
    report = prune_(
        model,
        DATA,
        sparsity=0.5,
        granularity="block",
        block={"linear": (2, 5)},
        importance="random",
    )
    by_name = {r.name: r for r in report.layers}
    assert by_name["conv1"].kept == by_name["conv1"].total
    assert by_name["conv1"].note == "left alone: block has no 'conv'"
    assert by_name["fc1"].granularity == "block 2x5"


def test_blocks_do_not_cross_groups():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3))
    kept = {"importance": "magnitude", "granularity": "block", "sparsity": 0.5}
    report = prune_(model, block=(4, 2), dry_run=True, **kept)
    assert report.layers[0].note == (
        "left alone: blocks of 4 rows cross its 4 groups of 2 output channels"
    )
    assert prune_(model, block=(2, 2), **kept).layers[0].kept == 8 * 2 * 9 // 2


def test_clean_up_is_right_after_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[2].weight[:, 4:] *= 1e-3
    data = [torch.rand(16, 8)]
    prune_(model, data, importance=NNRelief(), granularity="block", block=(2, 2), alpha=0.5)
    found = masks(model)
    unread = ~found["2.weight"].any(0)
    assert unread[4:].all()
    assert not found["0.weight"][unread].any() and not found["0.bias"][unread].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "blok", "block": (2, 2)}, "did you mean 'block'"),
        ({"granularity": "block"}, r"needs block=\(height, width\)"),
        ({"block": (2, 2)}, "goes with granularity='block', got None"),
        ({"granularity": "block", "block": (0, 2)}, "at least 1"),
        ({"granularity": "block", "block": (2, -1)}, "at least 1"),
        ({"granularity": "block", "block": {"dense": (2, 2)}}, "keys must be among"),
        ({"granularity": "block", "block": {}}, "keys must be among"),
        ({"granularity": "block", "block": (2, 2), "pattern": (1, 2, 4)}, "granularity='vnm'"),
        ({"granularity": "vnm", "pattern": (1, 2, 4)}, "neither alpha nor sparsity"),
        ({"granularity": "vnm"}, r"needs pattern=\(V, 2, M\)"),
    ],
)
def test_wrong_values_are_named(options, message):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=message):
        prune_(model, importance="magnitude", sparsity=0.5, **options)
    assert not masks(model)


@pytest.mark.parametrize("value", [3, (2,), (2, 2, 2), (2.0, 2), (True, 2), "22"])
def test_sizes_of_another_type_are_named(value):
    with pytest.raises(TypeError, match="block must be a pair"):
        prune_(nn.Linear(4, 4), granularity="block", block=value, sparsity=0.5)


def test_scores_have_no_blocks():
    with pytest.raises(ValueError, match="granularity must be one of"):
        score(nn.Linear(4, 4), importance="magnitude", granularity="block")


# -- V:N:M


def best_subset(values, count):
    """The largest sum of `count` of the values."""
    return max(sum(c) for c in itertools.combinations(values, count))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 7), groups=st.integers(1, 3), v=st.integers(1, 5), m=st.integers(4, 7),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_panels_are_the_best_at_each_step(rows, groups, v, m, seed):
    scores = rand(seed, rows, groups * m)
    keep = choose(scores, pattern=(v, 2, m))
    assert int(keep.sum()) == rows * groups * 2
    for first in range(0, rows, v):
        for start in range(0, groups * m, m):
            panel = scores[first : first + v, start : start + m].double()
            kept = keep[first : first + v, start : start + m]
            sums = panel.sum(0).tolist()
            columns = max(
                itertools.combinations(range(m), 4), key=lambda c: sum(sums[i] for i in c)
            )
            outside = torch.ones(m, dtype=torch.bool)
            outside[list(columns)] = False
            assert not kept[:, outside].any()
            for values, chosen in zip(panel, kept, strict=True):
                best = best_subset(values[list(columns)].tolist(), 2)
                assert float(values[chosen].sum()) == pytest.approx(best)
                assert int(chosen.sum()) == 2


def test_m_of_four_is_two_of_four_whatever_the_panel():
    scores = rand(5, 9, 16)
    expected = F.one_hot(scores.view(9, 4, 4).topk(2).indices, 4).sum(2).bool().view(9, 16)
    for v in (1, 3, 16):
        assert torch.equal(choose(scores, pattern=(v, 2, 4)), expected)


def test_equal_scores_keep_the_lower_index():
    keep = choose(torch.ones(2, 8), pattern=(2, 2, 8))
    assert keep.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_a_convolution_has_panels_at_every_position_or_of_whole_kernels():
    scores = rand(0, 4, 8, 3, 3)
    keep = choose(scores, pattern=(2, 2, 8))
    for r, s in itertools.product(range(3), range(3)):
        assert torch.equal(keep[:, :, r, s], choose(scores[:, :, r, s], pattern=(2, 2, 8)))
    model = nn.Sequential(nn.Conv2d(8, 4, 3))
    report = prune_(model, [torch.rand(2, 8, 5, 5)], granularity="vnm", pattern=(2, 2, 8))
    mask = masks(model)["0.weight"].flatten(2)
    assert torch.equal(mask.any(2), mask.all(2))  # NNrelief scores kernels
    assert (mask.any(2).sum(1) == 2).all()
    assert report.layers[0].granularity == "vnm 2:2:8" and report.layers[0].density == 0.25
    assert str(report).startswith("nnrelief, conv vnm 2:2:8, linear vnm 2:2:8")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), share=st.floats(0, 1))
def test_panels_of_a_pruned_layer(seed, share):
    alive = rand(seed, 6, 16) >= share
    keep = choose(rand(seed + 1, 6, 16), alive, pattern=(3, 2, 8))
    assert not (keep & ~alive).any()
    assert (keep.view(6, 2, 8).sum(2) <= 2).all()
    columns = keep.view(2, 3, 2, 8).any(1)
    assert (columns.sum(2) <= 4).all()
    assert torch.equal(choose(rand(seed + 2, 6, 16), keep, pattern=(3, 2, 8)), keep)


def test_inputs_that_m_does_not_divide_are_left_alone():
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))
    report = prune_(model, importance="magnitude", granularity="vnm", pattern=(4, 2, 8))
    assert report.layers[0].note == "left alone: M = 8 does not divide its 10 input features"
    assert report.layers[1].kept == 8
    with pytest.raises(ValueError, match="no layer to work on.*does not divide"):
        prune_(model, importance="magnitude", granularity="vnm", pattern=(4, 2, 16))


@pytest.mark.parametrize("pattern", [(0, 2, 4), (1, 1, 4), (1, 2, 3)])
def test_unusable_patterns_are_named(pattern):
    with pytest.raises(ValueError, match="V >= 1, N = 2 and M >= 4"):
        prune_(nn.Linear(8, 8), importance="magnitude", granularity="vnm", pattern=pattern)


def test_patterns_of_another_type_or_scope_are_named():
    with pytest.raises(TypeError, match="pattern must be a triple"):
        Panels.parse((2, 4))
    with pytest.raises(ValueError, match="works per row"):
        prune_(
            nn.Linear(8, 8), importance="magnitude", granularity="vnm", pattern=(1, 2, 4),
            scope="global",
        )  # fmt: skip
