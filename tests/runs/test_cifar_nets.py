"""VGG and ResNet through pruning, shrinking and a whole run, on small made-up images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import liveweight as lw
from liveweight import compress
from liveweight.prune import ShortcutMask
from liveweight.runs.checkpoints import recompress
from liveweight.runs.folder import RunFolder
from liveweight.runs.models import build_model
from liveweight.runs.nets.resnet import PadShortcut, ResNet
from liveweight.runs.nets.vgg import VGG

SMALL_VGG = (8, 8, "M", 8, "M", 8, "M", 8, "M", 8, "M")


def lively_(model: nn.Module) -> nn.Module:
    """Give BatchNorm uneven scales, shifts and means, so that pruning finds something to cut."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.2, 1.5)
            module.bias.data.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "size", "shortcuts"),
    [(lambda: VGG(SMALL_VGG, hidden=2), 32, 0), (lambda: build_model("resnet20", seed=0), 16, 9)],
)
def test_pruned_nets_shrink_to_the_same_function(make, size, shortcuts):
    model, x = lively_(make()), torch.randn(6, 3, size, size)
    before = sum(p.numel() for p in model.parameters())
    report = lw.prune_(model, [x], alpha={"conv": 0.5, "linear": 0.8})
    assert not any("left alone" in row.note for row in report.layers)
    masks = [m for m in model.modules() if isinstance(m, ShortcutMask)]
    assert len(masks) <= shortcuts and bool(masks) == bool(shortcuts)
    assert any(not mask.mask.all() for mask in masks) == bool(shortcuts)
    lw.strip_(model)
    expected = model(x)
    lw.shrink_(model, x)
    assert sum(p.numel() for p in model.parameters()) < before / 2
    assert torch.allclose(model(x), expected, atol=1e-4)


def test_a_pad_shortcut_takes_every_other_pixel_between_zero_channels():
    x = torch.randn(2, 3, 4, 6)
    y = PadShortcut(2)(x)
    assert y.shape == (2, 7, 2, 3)
    assert torch.equal(y[:, 2:5], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 5:].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VGG(size=48), "size must be a multiple of 32, got 48"),
        (lambda: VGG(size=0), "size must be a multiple of 32, got 0"),
        (lambda: ResNet(0), "blocks must be 1 or more, got 0"),
    ],
)
def test_sizes_that_cannot_be_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_residual_run_from_training_to_the_checkpoint(tiny, execute, tmp_path, quick):
    rng = np.random.default_rng(0)
    splits = {"train": 40, "validation": 12, "test": 12}
    arrays = {f"{n}_x": rng.integers(0, 256, (k, 3, 8, 8), np.uint8) for n, k in splits.items()}
    arrays |= {f"{n}_y": np.arange(k) % 4 for n, k in splits.items()}
    np.savez(tmp_path / "small.npz", **arrays)
    data = {"source": "numpy", "path": str(tmp_path / "small.npz")}
    data |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    moved = {"augment": ["crop", "flip"], "precision": "bf16"}
    recipe = tiny(
        model={"name": "liveweight.runs.nets.resnet:ResNet", "arguments": {"blocks": 1}},
        data=data,
        train=moved,
        retrain=moved,
        prune={"alpha": 0.6, "rewind": "none", "keep": "last"},
    )
    folder: RunFolder = execute(recipe, tmp_path / "run")
    assert any("autocast to bfloat16" in note for note in folder.result()["notes"])
    tensors, facts = folder.load_tensors("iterates/02")
    shortcuts = [value for key, value in tensors.items() if key.endswith("shortcut.1.mask")]
    assert len(shortcuts) > 0 and any(not mask.all() for mask in shortcuts)
    assert facts["kept"] < facts["total"] / 3
    path = folder.path / "checkpoint.safetensors"
    saved = compress.load(path, build_model(recipe.model.name, recipe.model.arguments)).eval()
    x = torch.randn(4, 3, 8, 8)
    expected = saved(x)
    assert torch.isfinite(expected).all()
    text = recompress(str(path), None, "4x3x8x8", "cpu", 1, str(tmp_path / "again.safetensors"))
    assert "saved" in text
    again = build_model(recipe.model.name, recipe.model.arguments)
    again = compress.load(tmp_path / "again.safetensors", again).eval()
    assert torch.allclose(again(x), expected, atol=1e-4)
