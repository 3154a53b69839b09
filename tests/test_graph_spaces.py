from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liveweight._graph import GraphError
from liveweight._graph_flow import Follower
from liveweight._graph_spaces import find_spaces


class Net(nn.Module):
    """Modules by name, and a forward given as a function of (self, x)."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, x)


def spaces_of(run, **modules):
    return {space.writers[0]: space for space in find_spaces(Net(run, **modules))}


def test_a_chain_of_convolutions_into_a_linear():
    found = spaces_of(
        lambda m, x: m.fc(F.max_pool2d(F.relu(m.bn(m.conv(x))), 2).flatten(1)),
        conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), fc=nn.Linear(54, 2),
    )  # fmt: skip
    space = found["conv"]
    assert (space.channels, space.vectors, space.fixed) == (6, ["bn"], "")
    assert space.readers == [Follower("fc", 9)]
    assert found["fc"].fixed == "it reaches the model's output"


def test_a_sum_makes_one_space_of_two():
    found = spaces_of(
        lambda m, x: m.last(torch.add(F.relu(m.a(x)), m.mid(m.a2(x)))),
        a=nn.Linear(3, 8), a2=nn.Linear(3, 5), mid=nn.Linear(5, 8), last=nn.Linear(8, 2),
    )  # fmt: skip
    assert found["a"].writers == ["a", "mid"] and not found["a"].fixed
    assert found["a2"].readers == [Follower("mid", 1)]


def test_a_sum_with_something_fixed_is_fixed():
    found = spaces_of(
        lambda m, x: m.last(m.a(x) + m.b(torch.cat([m.c(x), x], 1))) * m.c.weight.sum(),
        a=nn.Linear(3, 8), b=nn.Linear(6, 8), c=nn.Linear(3, 3), last=nn.Linear(8, 2),
    )  # fmt: skip
    assert found["a"].writers == ["a", "b"] and not found["a"].fixed
    assert found["c"].fixed == "it is concatenated with other channels"
    found = spaces_of(lambda m, x: m.a(x) + m.a(x).exp(), a=nn.Linear(3, 3))
    assert not found  # called twice: nothing is known of its output


def test_scaled_sums_and_sums_with_other_shapes_end_a_space():
    scaled = spaces_of(
        lambda m, x: m.c(torch.add(m.a(x), m.b(x), alpha=2)),
        a=nn.Linear(3, 4), b=nn.Linear(3, 4), c=nn.Linear(4, 2),
    )  # fmt: skip
    assert "residual add" in scaled["a"].fixed and "residual add" in scaled["b"].fixed
    broadcast = spaces_of(
        lambda m, x: m.c(m.a(x) + m.b(x)), a=nn.Linear(3, 4), b=nn.Linear(3, 1), c=nn.Linear(4, 2)
    )
    assert broadcast["a"].fixed and broadcast["b"].fixed


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions_fix_both_ends(groups):
    found = spaces_of(
        lambda m, x: m.c(m.b(m.a(x))),
        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 1, groups=groups), c=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    assert found["a"].fixed == found["b"].fixed == "b is a grouped convolution"


def test_depthwise_convolutions_belong_to_their_input():
    found = spaces_of(
        lambda m, x: m.c(F.relu6(m.bn(m.b(m.a(x))))),
        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 3, groups=8), bn=nn.BatchNorm2d(8),
        c=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    assert found["a"].vectors == ["b", "bn"] and found["a"].readers == [Follower("c", 1)]
    assert "b" not in found and not found["a"].fixed


def test_entries_per_channel_that_are_not_known_fix_a_space():
    class Table(nn.Module):
        channelwise = True

        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(2, 4))

        def forward(self, x):
            return x * self.table.sum(0).view(-1, 1, 1)

    found = spaces_of(
        lambda m, x: m.b(m.t(m.a(x))), a=nn.Conv2d(3, 4, 1), t=Table(), b=nn.Conv2d(4, 2, 1)
    )
    assert found["a"].fixed
    found = spaces_of(
        lambda m, x: m.b(m.t(m.a(x))), a=nn.Conv2d(3, 4, 1), t=nn.PReLU(4), b=nn.Conv2d(4, 2, 1)
    )
    assert found["a"].fixed
    found = spaces_of(
        lambda m, x: m.b(m.t(m.a(x))), a=nn.Conv2d(3, 4, 1), t=nn.PReLU(), b=nn.Conv2d(4, 2, 1)
    )
    assert not found["a"].fixed


def test_norms_that_are_called_twice_or_are_of_another_kind_fix_a_space():
    twice = spaces_of(
        lambda m, x: m.b(m.n(m.n(m.a(x)))), a=nn.Linear(3, 4), n=nn.LayerNorm(4), b=nn.Linear(4, 2)
    )
    assert "called more than once" in twice["a"].fixed
    grouped = spaces_of(
        lambda m, x: m.b(m.n(m.a(x))), a=nn.Conv2d(3, 4, 1), n=nn.GroupNorm(2, 4),
        b=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    assert "GroupNorm" in grouped["a"].fixed


def test_untraceable_models_say_why():
    with pytest.raises(GraphError, match="cannot be traced"):
        find_spaces(Net(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Linear(2, 2)))
