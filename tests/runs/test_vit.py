from __future__ import annotations

import copy

import pytest
import torch

import liveweight as lw
from liveweight.runs.models import build_model
from liveweight.runs.nets.vit import patches


def closed_form(channels, size, patch, width, depth, hidden, classes):
    """Weights and biases of every part, LayerNorms, class token and positions."""
    tokens = (size // patch) ** 2
    embed = (channels * patch**2 + 1) * width + width * (tokens + 2)
    block = 4 * width * width + 4 * width + 2 * width * hidden + hidden + width + 4 * width
    return embed + depth * block + 2 * width + (width + 1) * classes


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"size": 32, "channels": 3, "patch": 4, "width": 96, "classes": 7},
        {"width": 32, "depth": 2, "heads": 2, "hidden": 48, "merge": 0.5},
    ],
)
def test_parameters_are_the_closed_form(arguments):
    model = build_model("vit4", arguments, seed=0)
    full = {"size": 28, "channels": 1, "patch": 7, "width": 64, "depth": 4, "classes": 10}
    full |= {k: v for k, v in arguments.items() if k not in ("heads", "merge")}
    full.setdefault("hidden", 2 * full["width"])
    assert sum(p.numel() for p in model.parameters()) == closed_form(**full)
    x = torch.rand(2, full["channels"], full["size"], full["size"])
    assert model(x).shape == (2, full["classes"])


def test_patches_are_cut_row_by_row():
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    found = patches(x, 2)
    assert found.shape == (2, 6, 12)
    for i in range(6):
        top, left = 2 * (i // 3), 2 * (i % 3)
        assert torch.equal(found[:, i], x[:, :, top : top + 2, left : left + 2].flatten(1))


def test_merging_has_no_parameters_and_leaves_fewer_tokens_to_later_blocks():
    dense, merging = (build_model("vit4", {"merge": m}, seed=0) for m in (0.0, 0.5))
    assert merging.state_dict().keys() == dense.state_dict().keys()
    seen = []
    for model in (dense, merging):
        for block in model.blocks:
            block.mlp.register_forward_hook(lambda m, a, y: seen.append(y.shape[1]))
        model(torch.rand(2, 1, 28, 28))
    assert seen == [17, 17, 17, 17, 9, 9, 9, 9]
    late = build_model("vit4", {"merge": 0.25, "merge_block": 2}, seed=0)
    del seen[:]
    for block in late.blocks:
        block.mlp.register_forward_hook(lambda m, a, y: seen.append(y.shape[1]))
    late(torch.rand(1, 1, 28, 28))
    assert seen == [17, 17, 13, 13]


def test_an_image_of_equal_patches_is_seen_alike_with_and_without_merging():
    """All tokens but the class token are one: sizes make up for the tokens that went."""
    dense, merging = (build_model("vit4", {"merge": m}, seed=0).eval() for m in (0.0, 0.5))
    with torch.no_grad():
        for model in (dense, merging):
            model.positions.zero_()
        x = torch.rand(2, 1, 7, 7).repeat(1, 1, 4, 4)
        torch.testing.assert_close(merging(x), dense(x), atol=1e-5, rtol=1e-5)


def test_it_compiles_as_one_graph_and_trains_every_parameter():
    model = build_model("vit4", {"width": 16, "depth": 2, "merge": 0.5}, seed=0)
    x = torch.rand(2, 1, 28, 28)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_all_its_matrices_are_pruned_and_compressed():
    model = build_model("vit4", {"width": 32, "merge": 0.5}, seed=0).eval()
    report = lw.prune_(model, importance="magnitude", sparsity=0.9, ignore=["embed", "head"])
    assert {row.name for row in report.layers if row.kept < row.total} == {
        f"blocks.{i}.{name}"
        for i in range(4)
        for name in ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
    }
    lw.strip_(model)
    pruned = copy.deepcopy(model)
    x = torch.rand(4, 1, 28, 28)
    lw.compress_(model, x, formats="unstructured", budget_s=0.01)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), pruned(x), atol=1e-4, rtol=1e-4)


def test_hidden_units_shrink_away_exactly():
    model = build_model("vit4", {"width": 32, "merge": 0.5}, seed=0).eval()
    lw.prune_(model, importance="magnitude", sparsity=0.5, granularity="neuron", layers="*.mlp.0")
    lw.strip_(model)
    x = torch.rand(4, 1, 28, 28)
    before = model(x)
    lw.shrink_(model, x)
    assert [block.mlp[2].in_features for block in model.blocks] == [32] * 4
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": 5}, "size must be a multiple of patch, got 28 and 5"),
        ({"width": 30}, "width must be a multiple of heads, got 30 and 4"),
        ({"merge_block": 4}, r"merge_block must be in \[0, 3\], got 4"),
        ({"merge": 0.7}, r"ratio must be in \[0, 0.5\], got 0.7"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model("vit4", arguments)
