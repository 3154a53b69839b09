"""What every verb does with what it cannot use: an error that names it, and the model unharmed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import liveweight as lw
from liveweight.prune import Obd, OneShot, Pruner, adapt_, importances, merge_, prune_, score
from liveweight.prune.curvature import CURVATURES

LABELLED = [n for n, make in importances.items() if getattr(make(), "needs_labels", False)]
UNITS = ("apoz", "firing_rate", "dropout_damage")
DATA = [(torch.randn(6, 1, 6, 6), torch.randint(0, 3, (6,))) for _ in range(2)]
INPUTS = [x for x, _ in DATA]


def make() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6),
        nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


class Unharmed:
    """Values, masks, modes, hooks, gradients and parameters are afterwards what they were."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def look(self) -> tuple:
        modules = [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m._buffers))
            for m in self.model.modules()
        ]
        parameters = [(id(p), p.requires_grad, id(p.grad)) for p in self.model.parameters()]
        return modules, parameters

    def __enter__(self) -> None:
        self.tensors = copy.deepcopy(self.model.state_dict())
        self.before = self.look()

    def __exit__(self, *_: object) -> None:
        assert self.look() == self.before
        after = self.model.state_dict()
        assert after.keys() == self.tensors.keys()
        for name, value in self.tensors.items():
            assert torch.equal(after[name], value), name


def verbs(model: nn.Module, data: list, importance: object) -> dict:
    """Every verb that scores, as a call without arguments."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"importance": importance, "granularity": "neuron"}
    return {
        "score": lambda: score(model, data, **options),
        "prune_": lambda: prune_(model, data, sparsity=0.5, **options),
        "dry run": lambda: prune_(model, data, sparsity=0.5, dry_run=True, **options),
        "merge_": lambda: merge_(model, data, importance=importance, sparsity=0.5),
        "prune_to_": lambda: lw.prune_to_(
            model, data, INPUTS[0], target_parameters="50%", **options
        ),
        "Pruner": lambda: Pruner(model, optimizer, OneShot(0.5), data, **options).step(),
    }


@pytest.mark.parametrize("verb", verbs(make(), [], "snip"))
@pytest.mark.parametrize("name", LABELLED)
def test_data_without_labels(verb, name):
    model = make()
    with Unharmed(model), pytest.raises(ValueError, match=f"'{name}' needs labels"):
        verbs(model, INPUTS, name)[verb]()


@pytest.mark.parametrize("verb", verbs(make(), [], "snip"))
@pytest.mark.parametrize("name", LABELLED)
def test_gradients_under_inference_mode(verb, name):
    model = make()
    calls = verbs(model, DATA, name)
    with Unharmed(model), torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        calls[verb]()


@pytest.mark.parametrize("verb", verbs(make(), [], "snip"))
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("name", LABELLED)
def test_a_loss_that_is_not_finite(verb, value, name):
    model = make()

    def loss(output, labels):
        return (output * 0).sum() + float(value)

    importance = importances[name](loss=loss)
    with Unharmed(model), pytest.raises(ValueError, match=f"'{name}'.*(loss|finite)"):
        verbs(model, DATA, importance)[verb]()


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_loss_that_is_not_finite_under_every_curvature(curvature, value):
    model = make()

    def loss(output, labels):
        return nn.functional.cross_entropy(output, labels) + float(value)

    with Unharmed(model), pytest.raises(ValueError, match="'obd': the loss of a sample is"):
        prune_(model, DATA, importance=Obd(curvature, loss=loss), sparsity=0.5, layers="6")


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", importances)
def test_a_layer_whose_scores_are_all_zero(name, scope):
    """As many weights go as were asked for; over all layers, zeros go first."""
    model = make()
    with torch.no_grad():
        model[4].weight.zero_()
    if name in ("obs", "sparsegpt") and scope == "global":
        scope = "layer"
    report = prune_(model, DATA, importance=name, sparsity=0.5, scope=scope)
    rows = {row.name: row for row in report.layers}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model.eval()(INPUTS[0])).all()
    if name in UNITS or name == "nnrelief":  # these drop biases or what nothing reads, too
        assert sum(r.kept for r in rows.values()) <= 438 // 2 + 18
        return
    assert sum(r.kept for r in rows.values()) == 438 // 2
    if scope == "layer":
        assert [r.kept for r in rows.values()] == [r.total // 2 for r in rows.values()]
    elif name == "magnitude":
        assert (rows["0"].kept, rows["6"].kept) == (36, 18)


@pytest.mark.parametrize("name", ["nnrelief", "magnitude", "wanda", "taylor"])
@pytest.mark.parametrize("granularity", [None, "neuron"])
def test_a_share_of_no_mass_at_all(name, granularity):
    model = make()
    with torch.no_grad():
        model[4].weight.zero_()
        model[4].bias.zero_()
    report = prune_(model, DATA, importance=name, alpha=0.9, granularity=granularity)
    rows = {row.name: row for row in report.layers}
    assert rows["4"].kept == 0
    if name in ("magnitude", "wanda"):  # the others know that nothing gets through any more
        assert rows["0"].kept > 0
    assert torch.isfinite(model.eval()(INPUTS[0])).all()


def test_adaptation_under_inference_mode():
    model = make()
    with Unharmed(model), torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        adapt_(model, INPUTS, epochs=1)


def test_adaptation_with_nothing_to_train():
    model = make().requires_grad_(False)
    with Unharmed(model), pytest.raises(ValueError, match="no parameter requires gradients"):
        adapt_(model, INPUTS, epochs=1)


def test_adaptation_to_outputs_that_are_not_finite():
    model = make()
    with torch.no_grad():
        model[6].bias[0] = float("nan")
    with pytest.raises(ValueError, match="adapt_: the output is not finite"):
        adapt_(model, INPUTS, epochs=1)
    assert all(p.grad is None for p in model.parameters())


def test_adaptation_follows_data_that_comes_in_another_order_each_time():
    class Shuffled:
        """Batches of one sample; the order of every pass is another one."""

        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            xs = [x[i : i + 1] for x in INPUTS for i in range(6)]
            return iter(xs if self.passes % 2 else xs[::-1])

    model, seen = make().eval(), []

    def loss(output, labels):
        seen.append(bool((output.argmax(1) == labels).all()))
        return nn.functional.cross_entropy(output, labels)

    adapt_(model, Shuffled(), epochs=3, margin=0.0, lr=1e-6, loss=loss)
    assert len(seen) == 36 and all(seen)
    assert all(p.grad is None for p in model.parameters())
