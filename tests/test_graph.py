from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight._graph import Follower, GraphError, trace


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(128, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 4)
        )

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class Functional(nn.Module):
    """The same flow written with functions; `reshape` selects how the map is flattened."""

    def __init__(self, reshape="flatten", activation=F.relu):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(64, 10)
        self.reshape, self.activation = reshape, activation

    def forward(self, x):
        x = F.max_pool2d(self.activation(self.bn(self.conv(x))), 2)
        x = F.dropout(x, training=self.training)
        if self.reshape == "flatten":
            x = torch.flatten(x, 1)
        elif self.reshape == "view":
            x = x.view(-1, 64)
        elif self.reshape == "shape":
            x = x.reshape(x.shape[0], -1)
        elif self.reshape == "batch too":
            x = x.flatten()
        return F.log_softmax(self.fc(x), dim=1)


class PadShortcut(nn.Module):
    def __init__(self, before):
        super().__init__()
        self.before = before

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.before))


class Block(nn.Module):
    def __init__(self, cin, cout, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = shortcut

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1)
        self.layer1 = nn.Sequential(
            Block(4, 4, 1, nn.Sequential()),
            Block(4, 8, 2, PadShortcut(2)),
            Block(8, 8, 2, nn.Sequential(nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8))),
            Block(8, 8, 1, nn.Identity()),
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.layer1(F.relu(self.conv1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("training", [True, False])
def test_lenet_layers_in_order(training):
    graph = trace(LeNet().train(training))
    assert list(graph.layers) == ["features.0", "features.3", "classifier.0", "classifier.3"]
    conv1, conv2, fc1, fc2 = graph.layers.values()
    assert (conv1.activation, conv1.activation_name, conv1.pool) == (
        "relu",
        "features.1",
        "features.2",
    )
    assert conv1.followers == (Follower("features.3", 1),)
    assert conv2.followers == (Follower("classifier.0", 16),)
    assert fc1.followers == (Follower("classifier.3", 1),)
    assert all(layer.safe and layer.closed for layer in (conv1, conv2, fc1))
    assert fc2.is_output and not fc2.safe and "output" in fc2.why_unsafe


@pytest.mark.parametrize("reshape", ["flatten", "view", "shape"])
def test_functional_flow(reshape):
    layer = trace(Functional(reshape)).layers["conv"]
    assert (layer.norm, layer.activation, layer.activation_name) == ("bn", "relu", None)
    assert layer.followers == (Follower("fc", 16),)
    assert layer.safe and layer.zero_preserving
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(layer.activation_fn(x), x.relu())


def test_flattening_the_batch_is_unsafe():
    layer = trace(Functional("batch too")).layers["conv"]
    assert not layer.safe and not layer.closed
    assert "flatten" in layer.why_unsafe


@pytest.mark.parametrize(
    ("activation", "preserves"),
    [
        (torch.sigmoid, False),
        (F.gelu, True),
        (F.softplus, False),
        (torch.tanh, True),
        (F.silu, True),
    ],
)
def test_zero_preserving(activation, preserves):
    layer = trace(Functional(activation=activation)).layers["conv"]
    assert layer.activation == activation.__name__
    assert layer.zero_preserving is preserves
    assert layer.safe is preserves
    assert layer.closed


def test_softmax_mixes_channels():
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 2))
    layer = trace(model).layers["0"]
    assert not layer.safe and "mixes channels" in layer.why_unsafe and not layer.zero_preserving


def test_in_place_activation_function_leaves_its_argument():
    layer = trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 1))).layers[
        "0"
    ]
    x = torch.tensor([[-1.0, 2.0]])
    layer.activation_fn(x)
    assert x.tolist() == [[-1.0, 2.0]]


def test_batch_norm_after_the_activation_is_unsafe():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 2))
    layer = trace(model).layers["0"]
    assert layer.norm is None and layer.closed and not layer.safe
    assert "normalizes" in layer.why_unsafe


def test_unknown_operation_concatenation_and_grouped_convolution():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (
                nn.Conv2d(2, 4, 1),
                nn.Conv2d(4, 4, 1),
                nn.Conv2d(8, 8, 1, groups=2),
            )
            self.d = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            a = self.a(x)
            both = torch.cat([a, self.b(a.roll(1, 1))], 1)
            return self.d(self.c(both))

    layers = trace(Odd()).layers
    assert "concatenated" in layers["a"].why_unsafe and "roll" in layers["a"].why_unsafe
    assert not layers["a"].closed
    assert "grouped" in layers["c"].why_unsafe and layers["c"].closed


def test_module_used_twice_and_module_never_used():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(1, 1)

        def forward(self, x):
            return self.b(torch.relu(self.b(torch.relu(self.a(x)))))

    graph = trace(Twice())
    assert set(graph.layers) == {"a"} and not graph.layers["a"].safe
    assert "more than once" in graph.layers["a"].why_unsafe
    assert graph.skipped == {"b": "called more than once", "idle": "never called"}


def test_flatten_of_token_features_is_unsafe():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(15, 2)

        def forward(self, x):
            return self.b(self.a(x).flatten(1))

    assert not trace(Tokens()).layers["a"].safe


def test_untraceable_model_says_why():
    class Dynamic(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(GraphError, match="cannot be traced.*control flow"):
        trace(Dynamic())


def test_residual_blocks():
    graph = trace(ResNet())
    kinds = [(b.name, b.shortcut_kind, b.shortcut) for b in graph.residual_blocks]
    assert kinds == [
        ("layer1.0", "identity", "layer1.0.shortcut"),
        ("layer1.1", "pad", "layer1.1.shortcut"),
        ("layer1.2", "projection", "layer1.2.shortcut"),
        ("layer1.3", "identity", "layer1.3.shortcut"),
    ]
    first, pad, projection, last = graph.residual_blocks
    assert (first.conv1, first.conv2, first.norm2) == (
        "layer1.0.conv1", "layer1.0.conv2", "layer1.0.bn2",
    )  # fmt: skip
    assert first.consumers == (Follower("layer1.1.conv1", 1),) and first.feeds == ("layer1.1",)
    assert pad.pad_before == 2
    assert set(pad.consumers) == {
        Follower("layer1.2.conv1", 1), Follower("layer1.2.shortcut.0", 1),
    }  # fmt: skip
    assert pad.feeds == () and pad.closed
    assert (projection.projection, projection.projection_norm) == (
        "layer1.2.shortcut.0", "layer1.2.shortcut.1",
    )  # fmt: skip
    assert last.consumers == (Follower("fc", 1),) and last.closed
    assert all(block.whole and block.activation == "relu" for block in graph.residual_blocks)
    assert first.branch[0] == "layer1.0.conv1" and first.branch[-1] == "layer1.0.bn2"
    layers = graph.layers
    assert layers["layer1.0.conv1"].safe and layers["layer1.0.conv1"].norm == "layer1.0.bn1"
    assert "residual add" in layers["layer1.0.conv2"].why_unsafe
    assert "residual add" in layers["conv1"].why_unsafe
    assert layers["conv1"].feeds == ("layer1.0",) and not layers["conv1"].closed
    assert layers["layer1.0.conv2"].feeds == ()


def test_a_bare_identity_shortcut_has_no_module():
    class Bare(Block):
        def forward(self, x):
            return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), Bare(4, 4, 1, None), nn.Conv2d(4, 1, 1)))
    (block,) = graph.residual_blocks
    assert (block.shortcut, block.shortcut_kind, block.name) == (None, "identity", "1")
