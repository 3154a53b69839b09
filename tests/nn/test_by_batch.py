"""ByBatch hands each batch size to its module and behaves like one layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from liveweight.nn import ByBatch, PackedLinear, SparseLinear


class Named(nn.Linear):
    def __init__(self, name: str) -> None:
        super().__init__(4, 3)
        self.name = name

    def forward(self, x):
        seen.append(self.name)
        return super().forward(x)


seen: list[str] = []


def test_dispatch_by_rows():
    small, middle, large = (Named(n) for n in ("small", "middle", "large"))
    module = ByBatch([small, middle, large], [4.0, 22.6], sample_dim=1)
    for rows, name in ((1, "small"), (4, "small"), (5, "middle"), (22, "middle"), (23, "large")):
        seen.clear()
        module(torch.randn(rows, 4))
        assert seen == [name]
    seen.clear()
    assert module(torch.randn(4)).shape == (3,) and seen == ["small"]
    assert module(torch.randn(0, 4)).shape == (0, 3)
    assert "2: batch > 22.6" in repr(module)


@pytest.fixture
def layer():
    dense = nn.Linear(8, 6)
    dense.weight.data.mul_(torch.rand(6, 8) < 0.5)
    forms = [PackedLinear.from_dense(dense), SparseLinear.from_dense(dense)]
    return dense, ByBatch(forms, [4.0], sample_dim=1, parts=("fc", "norm"))


def test_looks_like_the_layer(layer):
    dense, module = layer
    assert (module.in_features, module.out_features) == (8, 6)
    assert torch.equal(module.weight, dense.weight) and module.parts == ("fc", "norm")
    with pytest.raises(AttributeError, match="no_such_thing"):
        module.no_such_thing  # noqa: B018
    assert not any(p.requires_grad for p in module.parameters())


def test_copies_pickles_and_state(layer):
    dense, module = layer
    for rows in (2, 9):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            y = module(x)
            assert torch.allclose(y, dense(x), atol=1e-5)
            for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert torch.equal(twin(x), y)
    other = copy.deepcopy(module)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, dense.weight)


def test_gradients_reach_the_input(layer):
    dense, module = layer
    for rows in (2, 9):
        x = torch.randn(rows, 8, requires_grad=True)
        expected = torch.autograd.grad(dense(x).sum(), x)[0]
        assert torch.allclose(torch.autograd.grad(module(x).sum(), x)[0], expected, atol=1e-6)


def test_compiles_with_a_guard_on_the_batch(layer):
    dense, module = layer
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        for rows in (2, 9, 3):
            x = torch.randn(rows, 8)
            assert torch.allclose(compiled(x), dense(x), atol=1e-5)


def test_limits_must_fit():
    with pytest.raises(ValueError, match="2 choices need 1 rising limits, got"):
        ByBatch([nn.Linear(2, 2), nn.Linear(2, 2)], [3.0, 4.0], sample_dim=1)
    with pytest.raises(ValueError, match="rising"):
        ByBatch([nn.Linear(2, 2)] * 3, [5.0, 4.0], sample_dim=1)
