"""compress_ swaps what is measured to be faster, and nothing else; times are invented here."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liveweight.nn as lwnn
from liveweight.compress import compress_
from liveweight.compress.measure import BUSY_NOTE, Timings


@pytest.fixture
def lenet(nets):
    return nets.sparsify(nets.settle(nets.LeNet()), 0.2), torch.randn(2, 1, 16, 16)


def rows(report):
    return {row.name: row for row in report.layers}


def test_faster_everywhere_joins_and_swaps(nets, lenet):
    model, x = lenet
    dense = copy.deepcopy(model)
    clock = nets.Clock(**nets.ALL_FASTER)
    report = compress_(model, x, measure=clock)
    conv, fc = model.features[0], model.classifier[1]
    assert isinstance(conv, lwnn.SparseConv2d) and isinstance(fc, lwnn.SparseLinear)
    assert (conv.activation, conv.pool) == ("relu", 2)
    assert conv.parts == ("features.0", "features.1", "features.2")
    assert fc.parts == ("classifier.1", "classifier.2")
    assert all(isinstance(model.features[i], nn.Identity) for i in (1, 2, 4, 5))
    assert isinstance(model.classifier[2], nn.Identity)
    assert model.classifier[3].activation is None  # the last layer has nothing to join
    assert clock.races[0][0] == "dense" and clock.races[0][-1] == "dense, packed+relu"
    assert clock.tried(0, "kernelwise") == ["kernelwise+relu", "kernelwise+relu+pool"]
    assert torch.allclose(model(x), dense(x), atol=1e-5)
    row = rows(report)["features.0"]
    assert row.chosen == "kernelwise" and row.speedup == 2.5 and row.parts == conv.parts
    assert row.candidates["kernelwise+relu+pool"] == 4.0 and row.candidates["dense"] == 10.0
    assert report.speedup == 2.0 and (report.dense_us, report.compressed_us) == (10.0, 5.0)


def test_values_never_change_and_masks_follow(nets, lenet):
    model, x = lenet
    dense = copy.deepcopy(model)
    compress_(model, x, measure=nets.Clock(unstructured_relu=5.0))
    assert torch.equal(model.classifier[1].weight, dense.classifier[1].weight)
    assert not hasattr(model.classifier[1], "weight_mask")
    assert torch.equal(model.features[0].weight_mask, dense.features[0].weight_mask)
    assert type(model.features[0]) is nn.Conv2d


def test_slower_stays_dense_and_says_why(nets, lenet):
    model, x = lenet
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    report = compress_(model, x, measure=nets.Clock())
    assert list(model.modules()) == modules
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    row = rows(report)["classifier.1"]
    assert row.chosen == "dense" and row.speedup == 1.0
    assert row.reason.startswith("dense is faster: unstructured")
    assert report.changed == [] and report.speedup is None
    assert "no layer was changed" in report.table()


def test_min_speedup(nets, lenet):
    model, x = lenet
    report = compress_(model, x, min_speedup=2.2, measure=nets.Clock(**nets.ALL_FASTER))
    assert set(report.changed) == {"features.0", "features.3", "classifier.1"}
    assert "below min_speedup 2.2" in rows(report)["classifier.3"].reason


def test_whole_model_vetoes(nets, lenet):
    model, x = lenet
    modules = list(model.modules())
    report = compress_(model, x, measure=nets.Clock(whole=12.0, **nets.ALL_FASTER))
    assert list(model.modules()) == modules
    assert report.changed == []
    assert "undone: the whole model ran at 0.83x" in rows(report)["features.0"].reason


def test_whole_model_keeps_the_stronger_half(nets, lenet):
    model, x = lenet
    clock = nets.Clock(whole=[12.0, 8.0], **{**nets.ALL_FASTER, "unstructured_relu": 1.0})
    report = compress_(model, x, measure=clock)
    assert len(report.changed) == 2 and "classifier.1" in report.changed
    assert report.speedup == 1.25
    assert sum(isinstance(m, (lwnn.SparseLinear, lwnn.SparseConv2d)) for m in model.modules()) == 2


def test_second_call_changes_nothing(nets, lenet):
    model, x = lenet
    compress_(model, x, measure=nets.Clock(**nets.ALL_FASTER))
    modules = list(model.modules())
    report = compress_(model, x, measure=nets.Clock(**nets.ALL_FASTER))
    assert list(model.modules()) == modules
    assert rows(report)["features.0"].reason == "already kernelwise"


def test_mode_and_gradient_flags_survive(nets, lenet):
    model, x = lenet
    model.train()
    model.classifier[1].weight.requires_grad_(False)
    compress_(model, x, measure=nets.Clock(**nets.ALL_FASTER))
    assert all(m.training for m in model.modules())
    assert not model.classifier[1].values.requires_grad
    assert model.features[0].values.requires_grad
    copy.deepcopy(model)(x).sum().backward()


def test_functional_activations_are_not_joined(nets):
    model = nets.sparsify(nets.settle(nets.FunctionalNet()), 0.3)
    clock = nets.Clock(unstructured=5.0)
    x = torch.randn(3, 12)
    dense = copy.deepcopy(model)
    compress_(model, x, measure=clock)
    assert [clock.tried(i, "unstructured") for i in range(3)] == [["unstructured"]] * 3
    assert torch.allclose(model(x), dense(x), atol=1e-5)


def test_residual_network_is_right(nets):
    model = nets.sparsify(nets.settle(nets.ResidualNet()), 0.3)
    x = torch.randn(3, 4, 6, 6)
    dense = copy.deepcopy(model)
    report = compress_(model, x, measure=nets.Clock(kernelwise=5.0, unstructured=5.0))
    assert len(report.changed) == 4
    assert torch.allclose(model(x), dense(x), atol=1e-4)


class SharedRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.fc2(self.relu(self.fc1(x))))


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(6, 6), nn.ReLU()

    def forward(self, x):
        y = self.fc(x)
        return self.relu(y) + y


@pytest.mark.parametrize("build", [SharedRelu, TwoReaders])
def test_only_exclusive_chains_are_joined(nets, build):
    model = nets.sparsify(build(), 0.4)
    clock = nets.Clock(unstructured=5.0)
    compress_(model, torch.randn(2, 6), measure=clock)
    for index in range(len(clock.races)):
        assert clock.tried(index, "unstructured") == ["unstructured"]


@pytest.mark.parametrize(
    "options",
    [{"stride": 1}, {"padding": 1}, {"ceil_mode": True}, {"dilation": 2}, {"kernel_size": (2, 1)}],
)
def test_other_pooling_is_not_joined(nets, options):
    pool = nn.MaxPool2d(**{"kernel_size": 2, **options})
    model = nets.sparsify(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), pool), 0.4)
    clock = nets.Clock(kernelwise_relu=5.0)
    dense = copy.deepcopy(model)
    x = torch.randn(2, 2, 9, 9)
    compress_(model, x, measure=clock)
    assert clock.tried(0, "kernelwise") == ["kernelwise+relu"] and len(clock.races) == 1
    assert model[2] is pool and torch.allclose(model(x), dense(x), atol=1e-5)


def test_pooling_without_activation_joins(nets):
    model = nets.sparsify(nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Tanh()), 0.4)
    dense = copy.deepcopy(model)
    x = torch.randn(2, 2, 9, 9)
    compress_(model, x, measure=nets.Clock(kernelwise_pool=2.0))
    assert model[0].pool == 2 and model[0].activation is None
    assert torch.allclose(model(x), dense(x), atol=1e-5)


def test_untraceable_model_is_chosen_without_joining(nets):
    model = nets.sparsify(nets.settle(nets.BranchingNet()), 0.4)
    report = compress_(model, torch.randn(2, 6), measure=nets.Clock(unstructured=5.0))
    assert report.changed == ["fc1", "fc2"] and "no layers were joined" in report.table()


def test_what_is_left_alone_is_named(nets):
    shared = nets.sparsify(nn.Linear(6, 6), 0.4)
    hooked = nets.sparsify(nn.Linear(6, 6), 0.4)
    hooked.register_forward_hook(lambda *_: None)
    tied = nn.Linear(6, 6)
    tied.weight = nets.sparsify(nn.Linear(6, 6), 0.4, masks=False).weight

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.full = nn.Linear(6, 6)
            self.a, self.b = shared, shared
            self.hooked, self.tied = hooked, tied
            self.unused = nets.sparsify(nn.Linear(6, 6), 0.4)
            self.conv1d = nn.Conv1d(1, 1, 1)
            self.pruned = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

        def forward(self, x):
            x = self.hooked(self.b(self.a(self.full(x))))
            x = F.linear(self.tied(x), self.tied.weight)
            return self.pruned(self.conv1d(x[:, None])[:, 0])

    model = Net()
    model.also_tied = nn.Linear(6, 6)
    model.also_tied.weight = tied.weight
    found = rows(compress_(model, torch.randn(2, 6), measure=nets.Clock(unstructured=5.0)))
    words = {
        "full": "dense is faster: dense, packed runs at 0.50x",
        "a": "several names, a, b",
        "hooked": "has hooks",
        "tied": "shares a parameter",
        "unused": "never runs",
        "conv1d": "Conv1d is not supported",
    }
    for name, text in words.items():
        assert found[name].chosen == "dense" and text in found[name].reason, name


def test_bare_layer_and_unsupported_convolution(nets):
    layer = nets.sparsify(nn.Linear(4, 4), 0.5)
    report = compress_(layer, torch.randn(2, 4), measure=nets.Clock(unstructured=1.0))
    assert "put it into a container" in report.layers[0].reason
    model = nets.sparsify(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), 0.5)
    report = compress_(model, torch.randn(1, 2, 5, 5), measure=nets.Clock(kernelwise=1.0))
    assert "kernelwise: SparseConv2d: padding_mode must be" in report.layers[0].reason
    assert type(model[0]) is nn.Conv2d


def test_formats_select_candidates(nets, lenet):
    model, x = lenet
    report = compress_(model, x, formats=["kernelwise"], measure=nets.Clock(**nets.ALL_FASTER))
    assert report.changed and all(name.startswith("features") for name in report.changed)
    assert "formats names none for a Linear" in rows(report)["classifier.1"].reason
    full = nn.Sequential(nn.Linear(4, 4))
    report = compress_(full, torch.randn(1, 4), formats=["unstructured"], measure=nets.Clock())
    assert report.layers[0].reason == "dense: it has no zeros"


def test_gpu_takes_only_kernels_of_its_own(monkeypatch):
    from liveweight.compress import candidates

    served = {
        "unstructured_conv2d": {"cpu": "c++", "cuda": "reference"},
        "block_linear": {"cpu": "c++", "cuda": "reference"},
        "block_conv2d": {"cpu": "reference", "cuda": "reference"},
        "kernelwise_conv2d": {"cpu": "c++", "cuda": "cuda c++"},
        "unstructured_linear": {"cpu": "c++", "cuda": "reference"},
        "bitmap_linear": {"cpu": "reference", "cuda": "cuda c++"},
        "delta_linear": {"cpu": "reference", "cuda": "reference"},
        "semi_structured_linear": {"cpu": "reference", "cuda": "cuda c++"},
    }
    monkeypatch.setattr(candidates, "backends", lambda: served)
    names, gpu = candidates.check_formats("auto"), torch.device("cuda")
    assert candidates.formats_for(nn.Conv2d(1, 1, 1), names, gpu) == ["kernelwise"]
    dense = nn.Linear(8, 2, dtype=torch.bfloat16)
    assert candidates.formats_for(dense, names, gpu) == ["bitmap"]
    with torch.no_grad():
        dense.weight[:, ::2] = 0
    assert candidates.formats_for(dense, names, gpu) == ["bitmap", "semi_structured"]
    with pytest.raises(ValueError, match="bitmap takes bfloat16 and float16, not float32"):
        candidates.formats_for(nn.Linear(8, 2), names, gpu)
    with pytest.raises(ValueError, match="no CUDA kernel for unstructured_linear"):
        candidates.formats_for(dense, ("unstructured",), gpu)


def test_disturbed_measurements_are_noted(nets, lenet):
    model, x = lenet

    def busy(calls, **options):
        timings = nets.Clock(**nets.ALL_FASTER)(calls, **options)
        return Timings(timings.samples, preemptions=1e4)

    assert compress_(model, x, measure=busy).notes.count(BUSY_NOTE) == 1


def test_failure_restores_everything(nets, lenet):
    model, x = lenet
    modules = list(model.modules())

    def broken(calls, **options):
        if "compressed" in calls:
            raise RuntimeError("the clock broke")
        return nets.Clock(**nets.ALL_FASTER)(calls)

    with pytest.raises(RuntimeError, match="the clock broke"):
        compress_(model, x, measure=broken)
    assert list(model.modules()) == modules and not model.training


def test_disagreement_restores_everything(nets, lenet, monkeypatch):
    model, x = lenet
    modules = list(model.modules())
    monkeypatch.setattr("liveweight.compress.choose.difference", lambda a, b: "values differ")
    with pytest.raises(RuntimeError, match="disagrees: values differ"):
        compress_(model, x, measure=nets.Clock(**nets.ALL_FASTER))
    assert list(model.modules()) == modules


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"formats": "unstructred"}, ValueError, "did you mean 'unstructured'"),
        ({"formats": ["csr"]}, ValueError, "unknown name 'csr'"),
        ({"formats": []}, ValueError, "formats is empty"),
        ({"formats": 3}, TypeError, "got int"),
        ({"min_speedup": 0.5}, ValueError, "at least 1.0.*got 0.5"),
        ({"min_speedup": float("nan")}, ValueError, "at least 1.0"),
        ({"min_speedup": "2"}, TypeError, "must be a number, got str"),
        ({"budget_s": 0}, ValueError, "budget_s must be a number above 0"),
        ({"example_inputs": 3}, TypeError, "got int"),
    ],
)
def test_bad_arguments(lenet, arguments, error, words):
    model, x = lenet
    with pytest.raises(error, match=words):
        compress_(model, **{"example_inputs": x, **arguments})


def test_report_as_json_and_table(nets, lenet):
    model, x = lenet
    report = compress_(model, (x,), measure=nets.Clock(**nets.ALL_FASTER))
    content = json.loads(report.to_json())
    assert content["layers"][0]["chosen"] == "kernelwise"
    assert content["layers"][0]["candidates"]["dense"] == 10.0
    text = str(report)
    assert "features.0 + features.1 + features.2" in text and "whole model: 10.0 us dense" in text


def test_real_measurement_runs(lenet):
    model, x = lenet
    dense = copy.deepcopy(model)
    report = compress_(model, x, budget_s=0.005)
    assert torch.allclose(model(x), dense(x), atol=1e-5)
    assert all(row.reason for row in report.layers)
    assert all(row.predicted_us["dense"] > 0 for row in report.layers)


def test_blocks_of_convolutions_are_left_to_gpus():
    from liveweight.compress import candidates

    names, cpu = candidates.check_formats("auto"), torch.device("cpu")
    tried = candidates.formats_for(nn.Conv2d(1, 1, 1), names, cpu)
    assert sorted(tried) == ["kernelwise", "unstructured"]
    assert "block" in candidates.formats_for(nn.Linear(1, 1), names, cpu)
    assert candidates.formats_for(nn.Conv2d(1, 1, 1), ("block",), cpu) == ["block"]


def test_blocks_for_a_gpu_depend_on_the_number_of_samples():
    from liveweight.compress.swap import FEW_SAMPLES, gpu_block

    layer = nn.Linear(512, 512)
    with torch.no_grad():  # most blocks of 16 x 16 are kept: few zeros between them
        kept = torch.rand(32, 32) < 0.35
        layer.weight.mul_(kept.repeat_interleave(16, 0).repeat_interleave(16, 1))
    few, many = gpu_block(layer, FEW_SAMPLES), gpu_block(layer, FEW_SAMPLES + 1)
    assert few == (16, 16) and many[0] > 16
