"""Crops and flips against a loop over images, and the precision of training."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from liveweight.runs.data import Split
from liveweight.runs.models import build_model
from liveweight.runs.pipeline import PAD, Augment, Moves, autocast_type
from liveweight.runs.recipe import TrainRecipe
from liveweight.runs.train import make_optimizer, order_seed, train_epoch

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_by_one(x, moves, black):
    """The same by padding, cutting out and flipping each image."""
    found = []
    for image, (down, right), flip in zip(
        x, moves.shift.tolist(), moves.flip.tolist(), strict=True
    ):
        wide = torch.stack(
            [F.pad(c, (PAD,) * 4, value=b) for c, b in zip(image, black, strict=True)]
        )
        height, width = image.shape[1:]
        cut = wide[:, PAD + down :][:, :height, PAD + right :][:, :, :width]
        found.append(cut.flip(2) if flip else cut)
    return torch.stack(found)


@pytest.mark.parametrize("names", [("crop",), ("flip",), ("crop", "flip")])
@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (9, 1, 5, 7), (3, 2, 3, 2), (0, 3, 8, 8)])
def test_a_batch_is_moved_like_each_image(names, shape):
    x = torch.randn(shape, generator=seeded(1))
    augment = Augment.make(names, [0.5] * shape[1], [0.25] * shape[1])
    assert augment.black == (-2.0,) * shape[1]
    moves = augment.draw(shape[0], seeded(2), CPU)
    moved = augment.apply(x, moves)
    assert moved.shape == x.shape
    if shape[0]:
        assert torch.equal(moved, one_by_one(x, moves, augment.black))
    channels_last = augment.apply(x.contiguous(memory_format=torch.channels_last), moves)
    assert torch.equal(channels_last, moved)


def test_a_crop_by_hand():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    up = Moves(torch.tensor([[1, -1]]), torch.tensor([False]))
    augment = Augment(("crop", "flip"), (9.0,))
    assert augment.apply(x, up).tolist() == [[[[9, 3, 4], [9, 9, 9]]]]
    mirrored = Moves(up.shift, torch.tensor([True]))
    assert augment.apply(x, mirrored).tolist() == [[[[4, 3, 9], [9, 9, 9]]]]


def test_moves_are_uniform_and_repeat():
    augment = Augment(("crop", "flip"))
    moves = augment.draw(9_000, seeded(), CPU)
    assert sorted(set(moves.shift.flatten().tolist())) == list(range(-PAD, PAD + 1))
    counts = moves.shift[:, 0].add(PAD).bincount()
    assert counts.sub(1000).abs().max() < 5 * 1000**0.5
    assert moves.flip.float().mean().item() == pytest.approx(0.5, abs=0.03)
    again = augment.draw(9_000, seeded(), CPU)
    assert torch.equal(again.shift, moves.shift) and torch.equal(again.flip, moves.flip)
    assert not Augment(("crop",)).draw(100, seeded(), CPU).flip.any()
    assert not Augment(("flip",)).draw(100, seeded(), CPU).shift.any()


def test_without_names_there_is_nothing_to_do():
    assert Augment.make([], [0.5], [0.5]) is None
    assert Augment.make(["flip"], [], []).black == ()


def test_inputs_that_are_no_images():
    moves = Augment(("flip",)).draw(2, seeded(), CPU)
    with pytest.raises(ValueError, match=r"images must be \[N, channels, .* got \(2, 4\)"):
        Augment(("flip",)).apply(torch.zeros(2, 4), moves)
    with pytest.raises(ValueError, match="black has 3 values, images 1 channels"):
        Augment(("flip",), (0.0,) * 3).apply(torch.zeros(2, 1, 4, 4), moves)


# -- training


def trained(augment=None, autocast=None):
    split = Split(torch.rand(30, 1, 28, 28, generator=seeded(3)), torch.arange(30) % 10)
    model = build_model("lenet5", seed=0)
    optimizer = make_optimizer(model, TrainRecipe())
    seed = order_seed(0, 0, 0)
    loss = train_epoch(model, split, optimizer, 8, seed, augment=augment, autocast=autocast)
    return model, loss


def test_an_epoch_without_augmentation_is_the_plain_loop():
    model, loss = trained()
    x, y = torch.rand(30, 1, 28, 28, generator=seeded(3)), torch.arange(30) % 10
    twin = build_model("lenet5", seed=0)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3, weight_decay=5e-4)
    total = 0.0
    for index in torch.randperm(30, generator=seeded(order_seed(0, 0, 0))).split(8):
        optimizer.zero_grad()
        step = F.cross_entropy(twin(x[index]), y[index])
        step.backward()
        optimizer.step()
        total += step.item() * len(index)
    assert loss == pytest.approx(total / 30)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_augmentation_is_seeded_and_changes_the_weights():
    augment = Augment(("crop", "flip"))
    first, second = (trained(augment)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(
        first["features.0.weight"], trained()[0].state_dict()["features.0.weight"]
    )


def test_bfloat16_training_keeps_float32_weights_and_comes_close():
    model, loss = trained(autocast=torch.bfloat16)
    _, expected = trained()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert loss == pytest.approx(expected, rel=0.02) and loss != expected


@pytest.mark.parametrize(
    ("precision", "amx", "expected"),
    [
        ("fp32", True, None),
        ("bf16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16),
        ("auto", False, None),
    ],
)
def test_auto_takes_bfloat16_where_the_cpu_multiplies_it(monkeypatch, precision, amx, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    assert autocast_type(precision, CPU) is expected


@pytest.mark.parametrize(
    ("major", "expected"), [(7, None), (8, torch.bfloat16), (9, torch.bfloat16)]
)
def test_auto_takes_bfloat16_on_gpus_from_ampere_on(monkeypatch, major, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert autocast_type("auto", torch.device("cuda")) is expected
