from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from liveweight._graph import trace
from liveweight.prune import NNRelief, ShortcutMask, load_state_, masks, prune_
from liveweight.prune.residual import weigh

PLAIN = NNRelief(cleanup=False)


def test_weigh_by_hand():
    branch = torch.zeros(4, 1, 2)
    shortcut = torch.zeros(4, 1, 2)
    branch[0, 0] = torch.tensor([3.0, 4.0])  # A = 5
    shortcut[0, 0, 0] = 0.5  # R / (A + R) = 0.09
    branch[1, 0, 0] = 1.0
    shortcut[1, 0, 1] = 9.5  # A / (A + R) = 0.095
    branch[2, 0, 0], shortcut[2, 0, 0] = 1.0, 9.0  # exactly 0.1 each way of the line
    cut_branch, cut_shortcut = weigh(branch, shortcut, 0.9)
    assert cut_branch.tolist() == [False, True, False, False]
    assert cut_shortcut.tolist() == [True, False, False, False]


def quiet(norm, channel, size):
    """Make a BatchNorm answer a constant of the given size on one channel."""
    with torch.no_grad():
        norm.weight[channel], norm.bias[channel] = 0.0, size


@pytest.fixture
def net(nets):
    """Channel 1 of block1's branch is weak, its channel 3 overwhelming."""
    torch.manual_seed(2)
    model = nets.ResNet().eval()
    quiet(model.block1.bn2, 1, 1e-4)
    quiet(model.block1.bn2, 3, 1e4)
    return model


DATA = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))]


def test_a_weak_branch_loses_its_filter_and_batch_norm(net):
    prune_(net, DATA, importance=PLAIN, alpha={"conv": 0.9})
    block = net.block1
    assert not block.conv2.weight_mask[1].any() and block.conv2.weight_mask[3].any()
    assert block.bn2.weight[1] == 0 and block.bn2.bias[1] == 0
    assert block.bn2.running_mean[1] == 0 and block.bn2.running_var[1] == 0


def test_a_weak_shortcut_is_masked(net):
    prune_(net, DATA, importance=PLAIN, alpha={"conv": 0.9})
    mask = net.block1.shortcut[-1]
    assert isinstance(mask, ShortcutMask) and mask.mask.tolist() == [True, True, True, False]
    x = torch.randn(2, 4, 5, 5)
    expected = x.clone()
    expected[:, 3] = 0
    assert torch.equal(net.block1.shortcut(x), expected)


def test_padding_shortcuts_are_masked_around_the_module(net, nets):
    prune_(net, DATA, importance=PLAIN, alpha={"conv": 0.9})
    shortcut = net.block2.shortcut
    assert isinstance(shortcut[0], nets.PadShortcut)
    # The padded channels carry nothing, so the rule cuts them.
    assert shortcut[1].mask[:2].tolist() == shortcut[1].mask[-2:].tolist() == [False, False]


def test_projections_are_kept_and_reported(net):
    quiet(net.block3.bn2, 0, 1e9)
    report = prune_(net, DATA, importance=PLAIN, alpha={"conv": 0.9})
    assert any("'block3'" in n and "shortcut kept: it is a projection" in n for n in report.notes)
    assert isinstance(net.block3.shortcut[0], nn.Conv2d)


def test_the_rule_belongs_to_mass_and_nnrelief(net, nets):
    for options in (
        {"importance": PLAIN, "sparsity": 0.3},
        {"importance": "magnitude", "alpha": 0.9},
    ):
        model = copy.deepcopy(net)
        prune_(model, DATA, **options)
        assert not any(isinstance(m, ShortcutMask) for m in model.modules())


def test_masks_only_grow_over_calls_and_wrap_once(net):
    prune_(net, DATA, importance=PLAIN, alpha={"conv": 0.9})
    first = net.block1.shortcut[-1].mask.clone()
    quiet(net.block1.bn2, 0, 1e4)
    prune_(net, DATA, importance=PLAIN, alpha={"conv": 0.9})
    second = net.block1.shortcut[-1].mask
    assert len(net.block1.shortcut) == 2
    assert not (second & ~first).any() and not second[0]
    kinds = [b.shortcut_kind for b in trace(net).residual_blocks]
    assert kinds == ["identity", "pad", "projection"]


def test_clean_up_across_blocks(nets):
    """Channel 2 of block1's output: block2 neither reads it by conv1 nor by its shortcut."""
    torch.manual_seed(0)
    model = nets.ResNet().eval()
    with torch.no_grad():
        model.block2.conv1.weight[:, 2] = 0
    quiet(model.block2.bn2, 2 + 2, 1e4)  # behind two padded channels
    prune_(model, DATA, importance=NNRelief(), alpha={"conv": 0.95})
    assert not model.block2.shortcut[-1].mask[4]
    assert not model.block1.conv2.weight_mask[2].any()
    assert model.block1.bn2.bias[2] == 0
    assert not model.block1.shortcut[-1].mask[2]
    # block1.conv1 may still read channel 2 of the stem, so the stem keeps it or loses it with that.
    stem_read = model.block1.conv1.weight_mask[:, 2].any()
    assert bool(model.conv1.weight_mask[2].any()) <= bool(stem_read)


def test_a_dry_run_and_a_failure_leave_the_modules(net, nets, monkeypatch):
    before = nets.state_of(net)
    prune_(net, DATA, alpha=0.9, dry_run=True)
    assert nets.same_state(before, nets.state_of(net))

    def fail(*_):
        raise RuntimeError("late")

    monkeypatch.setattr("liveweight.prune.verbs.drop_unread", fail)
    with pytest.raises(RuntimeError, match="late"):
        prune_(net, DATA, alpha=0.9)
    assert nets.same_state(before, nets.state_of(net))


def test_a_state_with_shortcut_masks_loads_into_a_fresh_model(net, nets):
    prune_(net, DATA, alpha=0.9)
    fresh = nets.ResNet()
    load_state_(fresh, net.state_dict())
    assert torch.equal(fresh.eval()(DATA[0]), net.eval()(DATA[0]))
    assert masks(fresh).keys() == masks(net).keys()


def test_a_bare_shortcut_is_weighed_but_kept(nets):
    class Bare(nets.Block):
        def forward(self, x):
            return x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))

    model = nn.Sequential(Bare(3, 3, 1, None), nn.Conv2d(3, 2, 1)).eval()
    quiet(model[0].bn2, 0, 1e4)
    quiet(model[0].bn2, 2, 1e-6)
    report = prune_(model, DATA, importance=PLAIN, alpha=0.9)
    assert not model[0].conv2.weight_mask[2].any()
    assert any("not a module that could be masked" in n for n in report.notes)


def test_a_block_that_is_also_an_output_loses_no_unit(nets):
    class Tap(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nets.Block(3, 3, 1, nn.Identity())
            self.second = nets.Block(3, 3, 1, nn.Identity())
            self.last = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            tap = self.first(x)
            return tap, self.last(self.second(tap))

    torch.manual_seed(0)
    model = Tap().eval()
    with torch.no_grad():
        model.second.conv1.weight[:, 1] = 0
    quiet(model.second.bn2, 1, 1e4)
    prune_(model, DATA, importance=NNRelief(), alpha=0.999)
    assert not model.second.shortcut[-1].mask[1]
    assert model.first.conv2.weight_mask[1].any()
