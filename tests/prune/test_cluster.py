from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from liveweight import prune
from liveweight.prune import cluster_, keep_masks, masks, prune_

IMAGES = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def randomize_(model):
    """Give every BatchNorm statistics and every parameter a value of its own."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def assert_same_function(model, before, data):
    for x in data:
        torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-5)


class Sequence(nn.Module):
    """Embedding-free Transformer MLP with LayerNorm inside, on [N, T, 6]."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 6)

    def forward(self, x):
        return x + self.down(F.gelu(self.norm(self.up(x))))


class Separable(nn.Module):
    """1x1 - depthwise with BatchNorm - 1x1 - pool - Linear, with a sigmoid on the way."""

    def __init__(self):
        super().__init__()
        self.one, self.bn1 = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.deep, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.two, self.fc = nn.Conv2d(16, 12, 1), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.sigmoid(self.bn1(self.one(x)))
        x = self.two(F.relu6(self.bn2(self.deep(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Stream(nn.Module):
    """A stem and an identity block on one stream of channels, a projection block, a head."""

    def __init__(self, block):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.block1 = block(16, 16, 1, nn.Sequential())
        projection = nn.Sequential(nn.Conv2d(16, 12, 1, 2), nn.BatchNorm2d(12))
        self.block2 = block(16, 12, 2, projection)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.block2(self.block1(F.relu(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def small_models(nets):
    torch.manual_seed(0)
    return {
        "mlp": (nets.Mlp(10, 24, 16, 12, 4), [torch.randn(5, 10)]),
        "conv": (nets.ConvNet(), IMAGES),
        "resnet": (nets.ResNet(), IMAGES),
        "stream": (Stream(nets.Block), IMAGES),
        "sequence": (Sequence(), [torch.randn(3, 5, 6)]),
        "separable": (Separable(), IMAGES),
    }


@pytest.mark.parametrize("name", ["mlp", "conv", "resnet", "stream", "sequence", "separable"])
@pytest.mark.parametrize("importance", ["nnrelief", "magnitude"])
def test_the_function_stays_and_no_layer_keeps_less(nets, name, importance):
    model, data = small_models(nets)[name]
    randomize_(model)
    before = copy.deepcopy(model)
    kept = {"importance": importance, "block": (4, 2), "sparsity": 0.75}
    report = cluster_(model, data, **kept)
    assert_same_function(model, before, data)
    assert report.orders and sum(r.after - r.before for r in report.layers) > 0.01
    for row in report.layers:
        assert row.before - 1e-6 <= row.after <= row.best + 1e-6
    for layer, order in report.orders.items():
        weight = before.get_submodule(layer).weight.detach()
        assert sorted(order.tolist()) == list(range(len(weight)))
        found = model.get_submodule(layer).weight.detach()
        same = weight[order].flatten(1).abs().sort(1).values
        torch.testing.assert_close(found.flatten(1).abs().sort(1).values, same, rtol=0, atol=0)
    again = prune_(
        model, data, importance=importance, granularity="block", block=(4, 2), sparsity=0.75,
        dry_run=True,
    )  # fmt: skip
    by_name = {r.name: r for r in again.layers}
    if importance == "magnitude":  # NNrelief scores Linears behind the pruned convolutions
        for row in report.layers:
            assert by_name[row.name].kept_mass == pytest.approx(row.after, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 17), min_size=2, max_size=4), block=st.tuples(
        st.integers(1, 6), st.integers(1, 6)
    ), sparsity=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_chain_and_any_block(widths, block, sparsity, seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, widths[0], 3), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    layers += [nn.Conv2d(widths[0], widths[1], 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    sizes = [widths[1] * 4, *widths[2:], 3]
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(a, b), nn.Tanh()]
    model = randomize_(nn.Sequential(*layers))
    before = copy.deepcopy(model)
    report = cluster_(model, IMAGES, importance="magnitude", block=block, sparsity=sparsity)
    assert_same_function(model, before, IMAGES)
    assert all(r.after >= r.before - 1e-6 for r in report.layers)


def test_masks_shortcut_masks_gradients_and_parameters_go_along(nets):
    model = randomize_(Stream(nets.Block))
    prune_(model, IMAGES, alpha={"conv": 0.8, "linear": 0.9})
    shortcut = next(m for m in model.modules() if isinstance(m, prune.ShortcutMask))
    shortcut.mask.copy_(torch.arange(16) % 3 != 0)
    model(IMAGES[0]).square().mean().backward()
    parameters = dict(model.named_parameters())
    gradients = {n: p.grad.clone() for n, p in parameters.items()}
    before, counts = copy.deepcopy(model), {n: int(m.sum()) for n, m in masks(model).items()}
    report = cluster_(model, IMAGES, importance="magnitude", block=(2, 1), sparsity=0.8)
    stem = report.orders["stem"]
    assert torch.equal(stem, report.orders["block1.conv2"]) and "block1.conv1" in report.orders
    assert torch.equal(shortcut.mask, torch.arange(16)[stem] % 3 != 0)
    assert_same_function(model, before, IMAGES)
    assert {n: int(m.sum()) for n, m in masks(model).items()} == counts
    for name, mask in masks(model).items():
        assert (model.get_parameter(name)[~mask] == 0).all()
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        torch.testing.assert_close(
            parameter.grad.flatten().sort().values, gradients[name].flatten().sort().values
        )
    model.zero_grad()
    model(IMAGES[0]).square().mean().backward()
    for name, order in report.orders.items():
        fresh = model.get_submodule(name).weight.grad.flatten(1).norm(dim=1)
        old = gradients[f"{name}.weight"].flatten(1).norm(dim=1)[order]
        torch.testing.assert_close(fresh, old, rtol=1e-3, atol=1e-5)


def test_masks_are_kept_while_training_goes_on(nets):
    model = nets.Mlp(8, 16, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prune_(model, importance="magnitude", sparsity=0.5)
    keep_masks(model, optimizer)
    x = torch.randn(4, 8)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        cluster_(model, [x], importance="magnitude", block=(4, 4), sparsity=0.5)
    for name, mask in masks(model).items():
        assert (model.get_parameter(name)[~mask] == 0).all() and not mask.all()


def test_a_residual_stream_moves_as_one(nets):
    model = randomize_(nets.ResNet())
    report = cluster_(model, IMAGES, importance="magnitude", block=(4, 2), sparsity=0.7)
    rows = {r.name: r for r in report.layers}
    # The stem and block1 share a stream that block2's shortcut slices and pads.
    assert "conv1" not in report.orders and "block1.conv2" not in report.orders
    assert rows["conv1"].units.startswith("as they were: ")
    assert rows["fc"].units == "as they were: it reaches the model's output"
    # block3 adds a projection, and only fc reads the sum.
    first, second = report.orders["block3.conv2"], report.orders["block3.shortcut.0"]
    assert torch.equal(first, second)


class Odd(nn.Module):
    """What must stay: concatenated, grouped, called twice, shared, split by position."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.twice, self.joined = nn.Linear(8, 8), nn.Linear(16, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.a.weight
        self.free, self.last = nn.Linear(8, 12), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.cat([self.a(x), self.twice(self.twice(self.b(x)))], 1)
        x = self.free(self.tied(self.joined(x)))
        return self.last(x[:, :6] * x[:, 6:])


def test_what_cannot_move_is_left_alone_with_the_reason():
    torch.manual_seed(0)
    model = Odd()
    x = [torch.randn(4, 8)]
    before = copy.deepcopy(model)
    report = cluster_(model, x, importance="magnitude", block=(2, 2), sparsity=0.5)
    rows = {r.name: r for r in report.layers}
    assert not report.orders
    assert_same_function(model, before, x)
    assert rows["b"].units == "as they were: twice reads it and is called more than once"
    assert "tied: it shares a parameter" in rows["joined"].units
    assert "not known to keep channels apart" in rows["free"].units
    assert any("shares its weight" in note for note in report.notes)


@pytest.mark.parametrize("where", ["hook", "parametrization"])
def test_hooks_and_parametrizations_stay(nets, where):
    model = nets.Mlp(8, 16, 12, 4)
    if where == "hook":
        model[2].register_forward_hook(lambda *_: None)
    else:
        nn.utils.parametrizations.weight_norm(model[2])
    report = cluster_(model, [torch.randn(4, 8)], importance="magnitude", block=(4, 4))
    assert not report.orders
    assert "it carries" in report.layers[0].units


def test_a_linear_behind_positions_of_a_linear_is_not_misread():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.each, self.all = nn.Linear(4, 8), nn.Linear(24, 3)

        def forward(self, x):  # [N, 3, 4]
            return self.all(self.each(x).flatten(1))

    model, x = Positions(), [torch.randn(2, 3, 4)]
    before = copy.deepcopy(model)
    report = cluster_(model, x, importance="magnitude", block=(4, 2), sparsity=0.5)
    assert_same_function(model, before, x)
    assert report.layers[0].units.endswith("a flatten joins several positions of a Linear's output")


def test_an_untraceable_model_is_reported(nets):
    class Branching(nets.Mlp):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    report = cluster_(Branching(8, 16, 4), [torch.ones(2, 8)], importance="magnitude", block=(4, 4))
    assert not report.orders
    assert "nothing was moved: the model cannot be traced" in str(report)
    assert all(r.before == pytest.approx(r.after) for r in report.layers)


@pytest.mark.parametrize("name", ["conv", "sequence", "stream"])
def test_a_dry_run_and_a_failure_leave_every_bit(nets, monkeypatch, name):
    model, data = small_models(nets)[name]
    randomize_(model).train()
    model(data[0]).square().mean().backward()
    before, gradients = nets.state_of(model), [p.grad.clone() for p in model.parameters()]

    def unchanged():
        pairs = zip(model.parameters(), gradients, strict=True)
        return nets.same_state(before, nets.state_of(model)) and all(
            torch.equal(p.grad, g) for p, g in pairs
        )

    options = {"importance": "nnrelief", "block": (2, 2), "sparsity": 0.6}
    planned = cluster_(model, data, dry_run=True, **options)
    assert planned.orders and "(dry run)" in str(planned) and unchanged()

    def disagree(*answers):
        assert not unchanged()
        raise RuntimeError("disagrees")

    monkeypatch.setattr(prune.cluster, "_check_same", disagree)
    with pytest.raises(RuntimeError, match="disagrees"):
        cluster_(model, data, **options)
    assert unchanged()


def test_a_disagreement_is_found_and_named(nets, monkeypatch):
    model = randomize_(nets.ConvNet())
    before = nets.state_of(model)
    monkeypatch.setattr(prune.permute, "columns", lambda order, fan: torch.arange(len(order) * fan))
    with pytest.raises(RuntimeError, match="disagrees on the first batch: values differ by up to"):
        cluster_(model, IMAGES, block=(2, 2), sparsity=0.5)
    assert nets.same_state(before, nets.state_of(model))


def test_an_operation_by_position_ends_the_walk(nets):
    class Ramp(nn.Module):
        channelwise = True

        def forward(self, x):
            return x * torch.arange(1.0, 1.0 + x.shape[1]).view(-1, 1, 1)

    model = nn.Sequential(nn.Conv2d(3, 16, 1), Ramp(), nn.Conv2d(16, 12, 1), nn.Flatten())
    report = cluster_(model, IMAGES, importance="magnitude", block=(4, 1), sparsity=0.5)
    assert not report.orders
    assert report.layers[0].units == "as they were: mul is not known to keep channels apart"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(nets, dtype):
    model = randomize_(nets.Mlp(10, 24, 16, 4)).to(dtype)
    x = torch.randn(6, 10, dtype=dtype)
    expected = model(x)
    assert cluster_(model, [x], importance="magnitude", block=(4, 4), sparsity=0.75).orders
    limit = 1e-10 if dtype == torch.float64 else 5e-2
    torch.testing.assert_close(model(x), expected, rtol=limit, atol=limit)


def test_one_shot_iterators_serve_scoring_and_the_check(nets):
    model = randomize_(nets.ConvNet())
    assert cluster_(model, iter(IMAGES), block=(2, 2), sparsity=0.5).orders


def test_the_report_is_json(nets):
    model = randomize_(nets.ConvNet())
    report = cluster_(model, IMAGES, block={"linear": (2, 5)}, sparsity=0.5)
    found = json.loads(report.to_json())
    assert [r["name"] for r in found["layers"]] == ["fc1", "fc2"]
    assert found["orders"]["fc1"] == report.orders["fc1"].tolist()
    assert "'conv1' left alone: block has no 'conv'" in report.notes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block": (0, 2)}, ValueError, "at least 1"),
        ({"block": 4}, TypeError, "block must be a pair"),
        ({"block": (2, 2), "sparsity": 1.5}, ValueError, r"sparsity must be in \[0, 1\]"),
        ({"block": (2, 2), "importance": "nnreleif"}, ValueError, "did you mean 'nnrelief'"),
        ({"block": (2, 2), "importance": "nnrelief"}, ValueError, "needs data"),
    ],
)
def test_wrong_arguments(nets, options, error, message):
    with pytest.raises(error, match=message):
        cluster_(nets.Mlp(4, 8, 2), **({"importance": "magnitude"} | options))
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        cluster_("net", block=(2, 2))
