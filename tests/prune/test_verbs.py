from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from liveweight.prune import (
    LayerScore,
    NNRelief,
    importances,
    masks,
    prune_,
    register_importance,
    score,
)

DATA = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.8},
        {"alpha": {"conv": 0.7}},
        {"sparsity": 0.5},
        {"sparsity": 0.5, "scope": "global", "importance": "magnitude"},
        {"sparsity": 0.5, "importance": "random", "granularity": "kernel"},
    ],
)
def test_a_dry_run_reports_and_leaves_every_bit(nets, options):
    model = nets.ConvNet().train()
    model.fc1.eval()
    before = nets.state_of(model)
    planned = prune_(model, DATA, dry_run=True, **options)
    assert nets.same_state(before, nets.state_of(model))
    assert not masks(model) and planned.kept < planned.total
    done = prune_(model, DATA, **options)
    assert [vars(r) for r in done.layers] == [vars(r) for r in planned.layers]
    assert not done.dry_run and "(dry run)" in str(planned)


def test_pruned_weights_are_zero_and_the_rest_untouched(nets):
    model = nets.ConvNet()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = prune_(model, DATA, importance="magnitude", sparsity=0.75)
    for name, mask in masks(model).items():
        parameter = model.get_parameter(name)
        assert (parameter[~mask] == 0).all() and torch.equal(parameter[mask], before[name][mask])
    for row in report.layers:
        assert row.kept == round(0.25 * row.total) and row.bias_kept == row.bias_total


def test_modes_and_hooks_are_restored_also_after_an_error(nets):
    model = nets.ConvNet().train()
    model.bn1.eval()
    before = nets.state_of(model)
    score(model, DATA)
    assert nets.same_state(before, nets.state_of(model))
    with pytest.raises(RuntimeError):
        score(model, [torch.randn(2, 5, 8, 8)])
    assert nets.same_state(before, nets.state_of(model))


def test_scoring_sees_the_model_in_eval_mode_without_gradients():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return self.fc(x)

    score(Spy().train(), [torch.randn(2, 3)])
    assert seen == [(False, False)]


@pytest.mark.parametrize(
    "data",
    [
        [torch.ones(4, 3)],
        torch.ones(4, 3),
        [(torch.ones(4, 3), torch.zeros(4))],
        [[torch.ones(4, 3), torch.zeros(4)]],
        [{"x": torch.ones(4, 3)}],
        ({"x": b} for b in torch.ones(4, 1, 3)),
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.ones(4, 3), torch.zeros(4)), 2
        ),
    ],
)
def test_batches_of_every_form(data):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2, bias=False)

        def forward(self, x):
            return self.fc(x)

    model = Model()
    weight = model.fc.weight.detach().abs()
    torch.testing.assert_close(score(model, data)["fc"], weight / weight.sum(1, keepdim=True))


def test_steps_bound_the_batches():
    taken = []

    def stream():
        for i in range(100):
            taken.append(i)
            yield torch.full((1, 3), float(i))

    score(nn.Sequential(nn.Linear(3, 2)), stream(), steps=4)
    assert taken == [0, 1, 2, 3]


class Untouched:
    """Asserts that the model is the same after the block."""

    def __init__(self, nets, model):
        self.nets, self.model = nets, model

    def __enter__(self):
        self.before = self.nets.state_of(self.model)

    def __exit__(self, *_):
        assert self.nets.same_state(self.before, self.nets.state_of(self.model))


@pytest.mark.parametrize("verb", [score, prune_])
@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "data is empty: no batch came"),
        ([torch.empty(0, 3, 8, 8)], ValueError, "data is empty: its batches hold no samples"),
        (None, ValueError, "'nnrelief' needs data"),
        ([torch.empty(2, 3, 8, 8, device="meta")], ValueError, "on meta but the model is on cpu"),
        (5, TypeError, "data must be an iterable of batches, got int"),
        (["text"], TypeError, "a batch must be a tensor.*got str"),
        ([torch.full((2, 3, 8, 8), float("nan"))], ValueError, "layer 'conv1' saw NaN"),
        ([torch.full((2, 3, 8, 8), float("inf"))], ValueError, "layer 'conv1' saw infinite"),
        ([DATA[0], torch.randn(2, 3, 9, 9)], ValueError, "layer 'conv1'.*changed shape"),
    ],
)
def test_bad_data(nets, verb, data, error, message):
    model = nets.ConvNet()
    rule = {"alpha": 0.9} if verb is prune_ else {}
    with Untouched(nets, model), pytest.raises(error, match=message):
        verb(model, data, **rule)


def test_activations_that_become_nan_name_the_layer_that_sees_them(nets):
    model = nets.ConvNet()
    with torch.no_grad():
        model.fc1.bias[0] = float("nan")
    with Untouched(nets, model), pytest.raises(ValueError, match="layer 'fc2' saw NaN"):
        prune_(model, DATA, alpha=0.9)


@pytest.mark.parametrize("variant", ["authors", "paper"])
def test_nan_in_both_variants(variant):
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(ValueError, match="layer '0' saw NaN"):
        score(model, [torch.full((1, 1, 4, 4), float("nan"))], importance=NNRelief(variant=variant))


def test_a_nan_weight_is_reported(nets):
    model = nets.Mlp(3, 2)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '0': scores must be finite"):
        prune_(model, importance="magnitude", sparsity=0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "got neither"),
        ({"alpha": 0.5, "sparsity": 0.5}, ValueError, "got both"),
        ({"alpha": -0.5}, ValueError, r"alpha must be in \[0, 1\]"),
        ({"sparsity": 7}, ValueError, r"sparsity must be in \[0, 1\], got 7"),
        ({"alpha": 0.5, "importance": "nnreleif"}, ValueError, "did you mean 'nnrelief'"),
        ({"alpha": 0.5, "importance": NNRelief}, TypeError, "Importance object, got NNRelief"),
        ({"alpha": 0.5, "granularity": "kernal"}, ValueError, "did you mean 'kernel'"),
        ({"alpha": 0.5, "steps": 0}, ValueError, "steps must be at least 1"),
        ({"alpha": 0.5, "steps": 1.5}, TypeError, "steps must be an int"),
        ({"alpha": 0.5, "ignore": "fc3"}, ValueError, "ignore: selector 'fc3' matches nothing"),
        ({"alpha": {"linear": 0.5}, "layers": "conv1"}, ValueError, "no layer to work on"),
    ],
)
def test_bad_arguments(nets, options, error, message):
    model = nets.ConvNet()
    with Untouched(nets, model), pytest.raises(error, match=message):
        prune_(model, DATA, **options)


def test_the_model_must_be_a_module():
    with pytest.raises(TypeError, match="model must be an nn.Module, got int"):
        score(3, DATA)


def test_a_failure_in_the_second_pass_leaves_the_model(nets):
    model = nets.ConvNet()

    class Twice:
        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            yield DATA[0] if self.passes == 1 else DATA[0] * float("nan")

    with Untouched(nets, model), pytest.raises(ValueError, match="saw NaN"):
        prune_(model, Twice(), alpha=0.8)


def test_layers_never_called_and_unsupported_modules_are_reported():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)
            self.up = nn.ConvTranspose1d(1, 1, 3)

        def forward(self, x):
            return self.a(x)

    model = Model()
    report = prune_(model, [torch.randn(5, 4)], alpha=0.5, importance=NNRelief(cleanup=False))
    rows = {r.name: r for r in report.layers}
    assert rows["idle"].note == "left alone: never called with this data"
    assert rows["idle"].kept == rows["idle"].total and rows["a"].kept < rows["a"].total
    assert any("'up' (ConvTranspose1d) is not supported" in n for n in report.notes)
    assert "idle" not in score(model, [torch.randn(5, 4)])
    assert (model.idle.weight != 0).all()


def test_ignored_layers_count_in_the_report(nets):
    model = nets.ConvNet()
    report = prune_(model, importance="magnitude", sparsity=0.5, ignore="conv*")
    assert report.total == sum(
        p.numel() for n, p in model.named_parameters() if not n.startswith("bn")
    )
    assert {r.name: r.note for r in report.layers}["conv1"] == "left alone: ignored"
    assert set(masks(model)) == {"fc1.weight", "fc2.weight"}


def test_the_report_in_all_its_forms(nets):
    report = prune_(nets.ConvNet(), DATA, alpha=0.8)
    assert report.compression == report.total / report.kept
    assert "conv2" in report.table() and "weights and biases kept" in str(report)
    loaded = json.loads(report.to_json())
    assert loaded["kept"] == report.kept and loaded["layers"][0]["name"] == "conv1"
    empty = prune_(nets.Mlp(3, 2), importance="magnitude", sparsity=1.0)
    assert json.loads(empty.to_json())["layers"][0]["kept"] == 0


def test_scores_print_as_a_table(nets):
    scores = score(nets.ConvNet(), DATA)
    text = str(scores)
    assert "nnrelief" in text and "conv1" in text and "top 10%" in text
    assert scores["conv1"].shape == (6, 3) and scores["fc1"].shape == (7, 20)
    assert scores.granularity == {
        "conv1": "kernel", "conv2": "kernel", "fc1": "weight", "fc2": "weight",
    }  # fmt: skip
    single = score(nets.ConvNet(), DATA, granularity="weight")["conv1"]
    assert single.shape == (6, 3, 3, 3)


def test_repeated_calls_only_prune_more(nets):
    model = nets.ConvNet()
    before = None
    for sparsity in (0.3, 0.6, 0.9, 0.5):
        prune_(model, importance="random", sparsity=sparsity)
        now = masks(model)
        if before is not None:
            assert not any((now[n] & ~before[n]).any() for n in now)
        before = {n: m.clone() for n, m in now.items()}
    assert int(before["fc1.weight"].sum()) == round(0.1 * 140)


def test_magnitude_keeps_the_largest_kernels(nets):
    model = nets.ConvNet()
    norms = model.conv1.weight.detach().flatten(2).norm(dim=2)
    prune_(model, importance="magnitude", sparsity=0.5, granularity="kernel", layers="conv1")
    kept = model.conv1.weight_mask.flatten(2).all(2)
    assert int(kept.sum()) == 9 and norms[kept].min() >= norms[~kept].max()


def test_random_depends_on_its_seed_alone(nets):
    from liveweight.prune import Random

    models = [nets.Mlp(8, 8, 8) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        prune_(model, importance=Random(seed), sparsity=0.5)
        torch.rand(3)
    a, b, c = (masks(m)["0.weight"] for m in models)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_an_importance_of_ones_own(nets):
    class FirstInputs:
        """Prefer inputs with a low index."""

        name = "first-inputs"

        def default_granularity(self, kind):
            return "weight"

        def observer(self, target):
            return None

        def score(self, target, seen):
            shape = target.score_shape
            return LayerScore(torch.arange(shape[1], 0, -1).double().expand(shape))

    register_importance("first-inputs", FirstInputs)
    try:
        model = nets.Mlp(4, 3)
        prune_(model, importance="first-inputs", sparsity=0.5)
        assert model[0].weight_mask.tolist() == [[True, True, False, False]] * 3
        with pytest.raises(ValueError, match="registered already"):
            register_importance("first-inputs", FirstInputs)
    finally:
        del importances["first-inputs"]
    with pytest.raises(TypeError, match="factory must be callable"):
        register_importance("x", 3)


def test_other_dtypes_and_unbatched_inputs():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    prune_(model, [torch.randn(3, 2, 4, 4, dtype=torch.float64)], alpha=0.8)
    assert model[3].weight.dtype == torch.float64
    half = nn.Sequential(nn.Linear(6, 4)).bfloat16()
    prune_(half, [torch.randn(3, 6, dtype=torch.bfloat16)], alpha=0.8)
    assert not half[0].weight_mask.all()
    lone = nn.Sequential(nn.Conv2d(2, 3, 3))
    batch = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(score(lone, [batch[0]])["0"], score(lone, [batch])["0"])
