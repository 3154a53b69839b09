"""Residual blocks that compress_ joins: which ones, with what numbers, saved and undone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight.compress import compress_, load, save
from liveweight.nn import Residual, ShortcutMask

from .nets import ALL_FASTER, Clock, settle, sparsify

FASTER = {f"kernelwise{tail}": 4.0 for tail in ("", "_relu", "_norm", "_norm_relu")}


class Block(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), the ReLUs modules or functions."""

    def __init__(self, width: int, channels: int, functional: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = F.relu if functional else nn.ReLU()
        self.shortcut = nn.Sequential()
        if width != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(width, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.act(out)


class Net(nn.Module):
    """A stem, two blocks and a classifier; 3x6x6 -> 3."""

    def __init__(self, block: type = Block, **options: object) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(block(4, 4, **options), block(4, 6, **options))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Scaled(Block):
    """Does more than the sum: it may not be joined."""

    def forward(self, x):
        return super().forward(x) * 2


def compressed(model, **clock):
    model = sparsify(settle(model), masks=False)
    dense, x = copy.deepcopy(model), torch.randn(2, 3, 6, 6)
    report = compress_(model, x, measure=Clock(**{**ALL_FASTER, **FASTER, **clock}))
    with torch.no_grad():
        assert torch.allclose(model(x), dense(x), atol=1e-4)
    return report


@pytest.mark.parametrize("functional", [False, True])
def test_blocks_are_joined_saved_and_loaded(functional, tmp_path):
    model = Net(functional=functional)
    names = set(dict(model.named_modules()))
    report = compressed(model)
    assert all(isinstance(block, Residual) for block in model.blocks)
    assert "the sums of 2 residual blocks are written in place" in report.notes
    assert set(dict(model.named_modules())) == names
    save(model, tmp_path / "net.safetensors")
    fresh = load(tmp_path / "net.safetensors", Net(functional=functional)).eval()
    assert all(isinstance(block, Residual) for block in fresh.blocks)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("fast", [False, True])
def test_masked_shortcuts_are_saved_and_loaded(fast, tmp_path):
    model = settle(Net())
    shortcut = ShortcutMask.behind(model.blocks[0].shortcut, 4, torch.device("cpu"))
    shortcut[1].mask[1:3] = False
    model.blocks[0].shortcut = shortcut
    if fast:
        compressed(model)
        assert isinstance(model.blocks[0], Residual)
    path, x = tmp_path / "net.safetensors", torch.randn(2, 3, 6, 6)
    save(model.eval(), path)
    fresh = load(path, settle(Net())).eval()
    assert fresh.blocks[0].shortcut[1].mask.tolist() == [True, False, False, True]
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
        if not fast:
            assert torch.equal(load(path, fresh)(x), model(x))  # the masks may be there already
    wrong = settle(Net())
    wrong.blocks[0].shortcut = nn.Identity()
    with pytest.raises(
        ValueError, match=r"blocks\.0\.shortcut is a Identity, expected a Sequential"
    ):
        load(path, wrong)
    wrong.blocks[0].shortcut, wrong.head = nn.Sequential(), nn.Linear(5, 3)
    before = dict(wrong.named_modules())
    with pytest.raises(ValueError, match="head"):
        load(path, wrong)
    assert dict(wrong.named_modules()) == before  # without the mask that was put there


def test_a_block_that_does_more_stays():
    model = Net(Scaled)
    compressed(model)
    assert all(type(block) is Scaled for block in model.blocks)


@pytest.mark.parametrize("watched", ["blocks.0", "blocks.0.bn2", "blocks.0.conv1"])
def test_a_block_that_is_watched_stays(watched):
    model = Net()
    model.get_submodule(watched).register_forward_hook(lambda *_: None)
    compressed(model)
    assert [isinstance(block, Residual) for block in model.blocks] == [False, True]


def test_blocks_come_back_where_their_layers_do():
    model = Net()
    report = compressed(model, whole=20.0)
    assert all(type(block) is Block for block in model.blocks)
    assert not report.changed
