"""Residual: the block's numbers, its names, and sums that are written in place."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from liveweight import _graph
from liveweight.nn import Residual


class Block(nn.Module):
    """A basic block with a projection or without."""

    def __init__(self, channels: int = 4, projection: bool = False) -> None:
        super().__init__()
        self.expansion = 1
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1)) if projection else None

    def forward(self, x):
        other = x if self.shortcut is None else self.shortcut(x)
        return self.relu(self.conv2(self.relu(self.norm1(self.conv1(x)))) + other)


BRANCH = ("conv1", "norm1", "relu", "conv2")


def joined(projection=False, activation="relu"):
    block = Block(projection=projection).eval()
    names = {"shortcut": "shortcut" if projection else None, "activation": activation}
    return block, Residual(block, BRANCH, **names)


@pytest.mark.parametrize("projection", [False, True])
def test_it_computes_the_block_and_leaves_its_input_alone(projection):
    block, residual = joined(projection)
    x = torch.randn(2, 4, 5, 5)
    before = x.clone()
    with torch.no_grad():
        assert torch.equal(residual(x), block(x))
    assert torch.equal(x, before)
    assert residual.state_dict().keys() == block.state_dict().keys()


def test_gradients_are_the_block_s():
    block, residual = joined(True)
    grads = []
    for module in (block, residual):
        x = torch.ones(1, 4, 3, 3, requires_grad=True)
        module(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_without_an_activation_and_with_a_relu_called_as_a_function():
    block = Block().eval()
    residual = Residual(block, ("conv1", "norm1", "", "conv2"), activation=None)
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        assert torch.equal(residual(x).relu(), block(x))
        assert (residual(x) < 0).any()


def test_a_sum_that_broadcasts_is_not_written_in_place():
    block = Block(1).eval()
    block.conv1 = nn.Conv2d(1, 1, 3)
    block.norm1 = nn.Identity()
    block.conv2 = nn.Conv2d(1, 1, 1)
    residual = Residual(block, BRANCH)
    x = torch.randn(2, 1, 3, 3)
    with torch.no_grad():
        assert torch.equal(residual(x), block(x))


def test_modules_are_shared_under_their_names():
    block, residual = joined()
    residual.conv1 = nn.Identity()
    assert isinstance(block.conv1, nn.Identity)
    assert residual.expansion == 1
    with pytest.raises(AttributeError):
        residual.nothing  # noqa: B018 - looking it up is the test
    for other in (copy.deepcopy(residual), pickle.loads(pickle.dumps(residual))):
        x = torch.randn(1, 4, 5, 5)
        with torch.no_grad():
            assert torch.equal(other(x), residual(x))
        assert [n for n, _ in other.named_modules()] == [n for n, _ in residual.named_modules()]


def test_tracing_sees_the_layers_inside():
    _, residual = joined()
    graph = _graph.trace(nn.Sequential(nn.Conv2d(4, 4, 1), residual))
    assert {"1.conv1", "1.conv2"} <= set(graph.layers)


def test_torch_compile_takes_it_whole():
    block, residual = joined(True)
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        got = torch.compile(residual, fullgraph=True, backend="eager")(x)
        assert torch.allclose(got, block(x), atol=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no module 'conv3'"):
        Residual(Block(), ("conv1", "conv3"))
    with pytest.raises(ValueError, match="activation must be"):
        Residual(Block(), BRANCH, activation="gelu")
    block = Block()
    block.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="of its own"):
        Residual(block, BRANCH)
