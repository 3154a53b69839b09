from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import liveweight as lw


def make() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 9, 30), nn.ReLU(),
        nn.Linear(30, 5),
    )  # fmt: skip


DATA = [(torch.randn(6, 1, 12, 12), torch.randint(0, 5, (6,))) for _ in range(2)]
X = DATA[0][0][:1]
WEIGHTS = 8 * 9 + 12 * 8 * 9 + 108 * 30 + 150
TOTAL = WEIGHTS + 8 + 16 + 12 + 30 + 5
# two per multiply-add: output positions 10x10, 3x3, then one a Linear
FLOPS = 2 * (100 * 72 + 9 * 864 + 3240 + 150)


def shrunk(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    lw.shrink_(twin, X)
    return twin


def kept_weights(model: nn.Module) -> int:
    return sum(int(m.weight.ne(0).sum()) for m in model if isinstance(m, (nn.Linear, nn.Conv2d)))


def state(model: nn.Module) -> tuple:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return tensors, [id(p) for p in model.parameters()], [m.training for m in model.modules()]


def assert_untouched(before: tuple, model: nn.Module) -> None:
    after = state(model)
    assert before[0].keys() == after[0].keys() and before[1:] == after[1:]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


def nanoseconds(model: nn.Module) -> float:
    """A machine that takes a nanosecond for a weight, and 200 for the rest."""
    return (kept_weights(model) + 200) * 1e-9


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("asked", ["20%", TOTAL // 5])
def test_parameters_are_what_is_kept_after_shrinking(scope, asked):
    model, dense = make(), make()
    report = lw.prune_to_(
        model, DATA, X, target_parameters=asked, importance="magnitude", scope=scope
    )
    small = shrunk(model)
    others = sum(p.numel() for n, p in small.named_parameters() if p.dim() == 1)
    assert report.reached and report.dense == TOTAL
    assert report.cost == kept_weights(small) + others <= 0.2 * TOTAL
    assert report.cost >= 0.98 * 0.2 * TOTAL
    for (name, mask), weight in zip(lw.masks(model).items(), (0, 4, 7, 9), strict=True):
        assert name == f"{weight}.weight"
        assert torch.equal(model[weight].weight, dense[weight].weight * mask)


def test_of_whole_units_all_that_is_left_can_count():
    model = make()
    report = lw.prune_to_(
        model, None, X, target_parameters="40%", importance="magnitude", granularity="neuron",
        count="dense", tolerance=0.1,
    )  # fmt: skip
    assert report.cost == sum(p.numel() for p in shrunk(model).parameters()) <= 0.4 * TOTAL
    assert report.reached and model.training


@pytest.mark.parametrize("asked", ["30%", 0.3 * FLOPS])
def test_flops_are_two_for_every_multiply_add_with_a_weight(asked):
    model = make()
    report = lw.prune_to_(model, None, X, target_flops=asked, importance="magnitude")
    assert report.dense == FLOPS
    kept = [int(shrunk(model)[i].weight.ne(0).sum()) for i in (0, 4, 7, 9)]
    found = 2 * sum(n * places for n, places in zip(kept, (100, 9, 1, 1), strict=True))
    assert 0.98 * 0.3 * FLOPS <= report.cost == found <= 0.3 * FLOPS


@pytest.mark.parametrize("asked", ["25%", 0.25 * nanoseconds(make())])
def test_latency_is_what_the_measure_says(asked):
    model, seen = make(), []
    report = lw.prune_to_(
        model, DATA, X, target_latency=asked, measure=nanoseconds, importance="wanda",
        on_trial=seen.append,
    )  # fmt: skip
    assert report.reached and report.kind == "latency"
    assert report.dense == nanoseconds(make())
    assert 0.98 * 0.25 <= report.cost / report.dense <= 0.25
    assert report.cost == nanoseconds(model)
    assert seen == report.trials and len(seen) <= 8
    assert report.pruned.kept == sum(int(m.sum()) for m in lw.masks(model).values()) + 55


def test_a_measured_copy_is_in_eval_mode_without_masks_and_the_first_is_dense():
    model = make()
    lw.prune_(model, importance="magnitude", sparsity=0.5)
    seen = []

    def measure(copied):
        seen.append((copied.training, len(lw.masks(copied)), kept_weights(copied)))
        return nanoseconds(copied)

    report = lw.prune_to_(
        model, None, X, target_latency="20%", measure=measure, importance="magnitude"
    )
    assert seen[0] == (False, 0, WEIGHTS)
    assert {entry[:2] for entry in seen} == {(False, 0)}
    assert report.reached and model.training and len(lw.masks(model)) == 4


@pytest.mark.parametrize("importance", sorted(lw.prune.importances))
def test_the_model_gets_the_masks_of_a_plain_pruning(importance):
    units = importance in ("apoz", "firing_rate", "dropout_damage")
    model, twin = make(), make()
    count = "dense" if units else "kept"
    report = lw.prune_to_(
        model, DATA, X, target_parameters="40%", importance=importance, count=count, tolerance=0.1
    )
    assert report.reached
    lw.prune_(twin, DATA, importance=importance, sparsity=report.sparsity)
    assert_untouched(state(model)[:1] + state(twin)[1:], twin)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"importance": "wanda"}, 1),
        ({"importance": "nnrelief", "scope": "global"}, 1),
        ({"importance": "nnrelief"}, None),
        ({"importance": "obs"}, None),
    ],
)
def test_data_is_read_once_where_scores_do_not_depend_on_the_cut(options, passes):
    class Counted(list):
        count = 0

        def __iter__(self):
            self.count += 1
            return super().__iter__()

    data = Counted(DATA)
    report = lw.prune_to_(make(), data, X, target_parameters="15%", **options)
    assert report.reached and len(report.trials) > 1
    checks = data.count if passes is None else 1 + passes  # one batch is looked at beforehand
    assert data.count == checks
    assert passes is not None or data.count >= 2 + len(report.trials)


def test_an_iterator_serves_all_trials():
    report = lw.prune_to_(make(), iter(DATA), X, target_parameters="15%", steps=2)
    assert report.reached and len(report.trials) > 1


def test_a_target_out_of_reach_leaves_the_model_and_says_what_was_lowest():
    model = make()
    before = state(model)
    report = lw.prune_to_(model, DATA, X, target_parameters=10, max_sparsity=0.5)
    assert_untouched(before, model)
    assert not report.reached
    assert (report.sparsity, report.cost, report.pruned) == (None, None, None)
    assert report.lowest.sparsity == 0.5 and report.lowest.cost > 10
    assert "not reached, the model is as it was; lowest" in report.summary()
    assert "the target is out of reach at sparsity 0.5" in report.summary()


def test_a_cost_that_never_falls_ends_too():
    model = make()
    before = state(model)
    report = lw.prune_to_(model, DATA, X, target_latency="50%", measure=lambda m: 1.0, max_trials=7)
    assert not report.reached and len(report.trials) <= 7
    assert_untouched(before, model)


def test_a_model_that_nothing_gets_through_meets_no_target():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)  # goes first where layers compete
    report = lw.prune_to_(
        model, None, torch.ones(1, 6), target_parameters=10, importance="magnitude",
        scope="global",
    )  # fmt: skip
    assert not report.reached
    assert any(math.isinf(t.cost) for t in report.trials)
    assert "cut through" in str(report) and not lw.masks(model)
    assert None in [t["cost"] for t in json.loads(report.to_json())["trials"]]


def test_rounds_go_in_equal_factors_and_are_followed_by_finetuning():
    model, seen = make(), []

    def finetune(report):
        seen.append((report.cost, kept_weights(model)))
        with torch.no_grad():
            for name, mask in lw.masks(model).items():
                model.get_parameter(name).add_(0.01 * mask)

    report = lw.prune_to_(
        model, None, X, target_latency="12.5%", measure=nanoseconds, importance="magnitude",
        rounds=3, finetune=finetune,
    )  # fmt: skip
    shares = [round_.target / round_.dense for round_ in [*report.earlier, report]]
    assert shares == pytest.approx([0.5, 0.25, 0.125])
    assert [cost for cost, _ in seen] == [round_.cost for round_ in [*report.earlier, report]]
    assert [kept * 1e-9 + 200e-9 for _, kept in seen] == pytest.approx([c for c, _ in seen])
    assert len(json.loads(report.to_json())["earlier"]) == 2


def test_a_round_out_of_reach_stays_at_the_one_before():
    model, calls = make(), []
    report = lw.prune_to_(
        model, None, X, target_latency="4%", measure=nanoseconds, importance="magnitude",
        rounds=4, finetune=calls.append,
    )  # fmt: skip
    assert not report.reached and 0 < len(calls) < 4
    assert report.earlier == calls
    assert nanoseconds(model) == calls[-1].cost


def test_a_loop_of_ones_own_goes_part_of_the_way():
    model = make()
    options = {"target_parameters": "25%", "importance": "magnitude"}
    half = lw.prune_to_(model, None, X, part=0.5, **options)
    assert half.target == pytest.approx(0.5 * TOTAL)
    whole = lw.prune_to_(model, None, X, part=1.0, **options)
    assert whole.target == pytest.approx(0.25 * TOTAL)
    assert whole.cost <= whole.target and whole.dense == half.dense == TOTAL


def test_a_model_that_meets_the_target_already_stays_as_it_is():
    model = make()
    options = {"target_parameters": "25%", "importance": "magnitude"}
    lw.prune_to_(model, None, X, **options)
    before = state(model)
    report = lw.prune_to_(model, None, X, **options | {"target_parameters": "40%"})
    assert report.reached and report.sparsity == 0.0 and len(report.trials) <= 3
    assert "nothing more has to go" in report.summary()
    assert_untouched(before, model)


def test_masks_of_torch_are_taken_along():
    model = make().train()
    torch_prune.l1_unstructured(model[7], "weight", 0.5)
    model(DATA[0][0])  # leaves a tensor in the module that cannot be copied
    computed = model[7].weight
    with pytest.raises(ValueError, match="matches nothing"):
        lw.prune_to_(model, None, X, target_flops="20%", importance="magnitude", ignore="none")
    assert model[7].weight is computed and not computed.is_leaf
    report = lw.prune_to_(model, None, X, target_flops="20%", importance="magnitude")
    assert report.reached and report.dense == FLOPS
    assert len(lw.masks(model)) == 4 and not hasattr(model[7], "weight_orig")


def test_what_cannot_be_traced_is_pruned_without_shrinking():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x, twice):
            h = self.first(x)
            return self.second(2 * h if h.sum() > 0 else h) + twice

    model = Forked()
    x = {"x": torch.randn(3, 6), "twice": torch.ones(1)}
    report = lw.prune_to_(model, [x], x, target_flops="50%", importance="wanda")
    assert report.reached and report.dense == 2 * 3 * (48 + 32)
    kept = int(model.first.weight.count_nonzero() + model.second.weight.count_nonzero())
    assert report.cost == 6 * kept


def test_options_of_prune_reach_it():
    model = make()
    report = lw.prune_to_(
        model, None, X, target_parameters="60%", importance="magnitude", granularity="block",
        block=(2, 3), ignore="4",
    )  # fmt: skip
    assert report.reached and "4.weight" not in lw.masks(model)
    assert {r.granularity for r in report.pruned.layers} == {"block 2x3", "-"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "give one of target_latency, target_parameters, target_flops, got none"),
        ({"target_flops": 5, "target_latency": 1}, ValueError, "got target_latency=1, target_fl"),
        ({"target_parameters": 0.1}, ValueError, 'got 0.1; write a share.*as "50%"'),
        ({"target_flops": 0}, ValueError, "target_flops must be FLOPs, 1 or more, got 0"),
        ({"target_latency": -1.0}, ValueError, "target_latency must be seconds, above 0, got -1"),
        ({"target_latency": math.nan}, ValueError, "target_latency must be seconds"),
        ({"target_latency": True}, TypeError, "target_latency must be a number.*got bool"),
        ({"target_latency": "half"}, ValueError, "above 0% and up to 100%.*got 'half'"),
        ({"target_latency": "0%"}, ValueError, "got '0%'"),
        ({"target_latency": "120%"}, ValueError, "got '120%'"),
        ({"target_latency": "50"}, ValueError, "got '50'"),
        ({"target_flops": 5, "count": "kep"}, ValueError, "count must be one of.*'kept'"),
        ({"target_flops": 5, "measure": nanoseconds}, ValueError, "measure goes with target_lat"),
        ({"target_latency": 5, "measure": 1}, TypeError, "measure must be callable, got int"),
        ({"target_flops": 5, "max_sparsity": 1.5}, ValueError, r"max_sparsity must be in \[0, 1"),
        ({"target_flops": 5, "max_sparsity": 0.0}, ValueError, "max_sparsity must be above 0"),
        ({"target_flops": 5, "part": 0.0}, ValueError, "part must be above 0"),
        ({"target_flops": 5, "tolerance": 1.0}, ValueError, "tolerance must be below 1"),
        ({"target_flops": 5, "max_trials": 0}, ValueError, "max_trials must be a whole number"),
        ({"target_flops": 5, "rounds": 1.5}, ValueError, "rounds must be a whole number"),
        ({"target_flops": 5, "importance": "magnitud"}, ValueError, "'magnitude'"),
        ({"target_flops": 5, "ignore": "nine"}, ValueError, "selector 'nine' matches nothing"),
        ({"target_flops": 5, "granularity": "block"}, ValueError, "needs block="),
        ({"target_flops": 5, "data": None}, ValueError, "'nnrelief' needs data"),
        ({"target_flops": 5, "data": []}, ValueError, "data is empty"),
        ({"target_flops": 5, "x": torch.empty(0, 1, 12, 12)}, ValueError, "holds an empty"),
        ({"target_flops": 5, "x": "image"}, TypeError, "example_inputs must be a tensor"),
    ],
)
def test_bad_arguments_change_nothing(options, error, message):
    model = make()
    before = state(model)
    options = dict(options)
    data, x = options.pop("data", DATA), options.pop("x", X)
    with pytest.raises(error, match=message):
        lw.prune_to_(model, data, x, **options)
    assert_untouched(before, model)


@pytest.mark.parametrize("importance", ["obd", "obd_sd", "snip", "taylor", "dropout_damage"])
def test_missing_labels_are_named_before_anything_is_measured(importance):
    model, calls = make(), []
    before = state(model)
    with pytest.raises(ValueError, match=f"'{importance}' needs labels"):
        lw.prune_to_(
            model, [x for x, _ in DATA], X, target_latency="50%", measure=calls.append,
            importance=importance,
        )  # fmt: skip
    assert calls == []
    assert_untouched(before, model)


def test_a_measure_that_fails_in_a_trial_leaves_the_model():
    model, calls = make(), []
    before = state(model)

    def measure(copied):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the board is gone")
        return 1.0 / len(calls)

    with pytest.raises(RuntimeError, match="the board is gone"):
        lw.prune_to_(model, DATA, X, target_latency="10%", measure=measure)
    assert_untouched(before, model)
