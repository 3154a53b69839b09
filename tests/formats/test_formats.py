"""Formats: round trips for any weight, and one message per broken invariant."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveweight import _packing
from liveweight.formats import Kernelwise, Unstructured

SPECIAL = st.sampled_from([0.0, -0.0, 1.5, -2.0, 1e-40, float("inf")])
FORMATS = [(Unstructured, 2), (Kernelwise, 4)]


@st.composite
def weights(draw, dim: int) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 5), min_size=dim, max_size=dim))
    count = int(np.prod(shape))
    values = draw(st.lists(SPECIAL, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


@given(weights(2))
@settings(deadline=None, max_examples=60)
def test_unstructured_round_trip(weight):
    packed = Unstructured.from_dense(weight).validate()
    assert torch.equal(packed.to_dense(), weight)  # -0.0 == 0.0
    assert packed.values.numel() == int((weight != 0).sum())
    assert packed.density == (packed.values.numel() / weight.numel() if weight.numel() else 0.0)


@given(weights(4))
@settings(deadline=None, max_examples=60)
def test_kernelwise_round_trip(weight):
    packed = Kernelwise.from_dense(weight).validate()
    assert torch.equal(packed.to_dense(), weight)
    assert packed.channels.numel() == int((weight != 0).flatten(2).any(2).sum())
    assert packed.values.shape[1:] == weight.shape[2:]


@given(weights(2), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_unstructured_mask_says_what_is_kept(weight, random):
    mask = torch.tensor([random.random() < 0.5 for _ in range(weight.numel())], dtype=torch.bool)
    mask = mask.reshape(weight.shape)
    packed = Unstructured.from_dense(weight, mask).validate()
    assert packed.values.numel() == int(mask.sum())
    assert torch.equal(packed.to_dense(), torch.where(mask, weight, 0.0))


def test_small_example():
    packed = Unstructured.from_dense(
        torch.tensor([[0.0, 2.0, -0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    )
    # The row with two entries comes first.
    assert packed.values.tolist() == [3.0, 4.0, 2.0]
    assert packed.columns.tolist() == [0, 2, 1]
    assert packed.segments.tolist() == [[2, 1], [0, 0]]
    assert packed.offsets.tolist() == [[0, 0], [3, 2]]
    assert packed.columns.dtype == packed.segments.dtype == torch.uint8
    assert packed.nbytes == 3 * 5 + 2 * 2 + 4 * 4 and packed.device.type == "cpu"


def test_kernel_of_negative_zeros_is_removed_and_zeros_inside_a_kept_kernel_stay():
    weight = torch.zeros(1, 2, 2, 2)
    weight[0, 0] = -0.0
    weight[0, 1, 0, 0] = 1.0
    weight[0, 1, 1, 1] = -0.0
    packed = Kernelwise.from_dense(weight)
    assert packed.channels.tolist() == [1]
    assert torch.equal(torch.signbit(packed.values[0]), torch.signbit(weight[0, 1]))


@pytest.mark.parametrize("whole", [True, False])
def test_kernelwise_mask(whole):
    weight = torch.randn(3, 2, 3, 3)
    mask = torch.rand(3, 2) < 0.5 if whole else torch.rand(3, 2, 3, 3) < 0.1
    packed = Kernelwise.from_dense(weight, mask).validate()
    dense_mask = mask[:, :, None, None] if whole else mask
    assert torch.equal(packed.to_dense(), weight * dense_mask)
    assert packed.channels.numel() == int((mask if whole else mask.flatten(2).any(2)).sum())


def test_masks_keep_zeros():
    assert Unstructured.from_dense(torch.zeros(2, 3), torch.ones(2, 3) > 0).values.numel() == 6
    assert Kernelwise.from_dense(torch.zeros(2, 3, 1, 1), torch.ones(2, 3) > 0).density == 1.0


def test_nan_is_kept():
    assert torch.isnan(
        Unstructured.from_dense(torch.tensor([[float("nan"), 0.0]])).values
    ).tolist() == [True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind,dim", FORMATS)
def test_dtypes_survive(kind, dim, dtype):
    weight = torch.randn(3, 4, 2, 2).to(dtype) if dim == 4 else torch.randn(3, 4).to(dtype)
    packed = kind.from_dense(weight).validate()
    assert packed.values.dtype == dtype and torch.equal(packed.to_dense(), weight)


def test_values_are_detached_copies():
    weight = torch.ones(2, 2, requires_grad=True)
    packed = Unstructured.from_dense(weight)
    packed.values.zero_()
    assert not packed.values.requires_grad and bool((weight == 1).all())


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Unstructured.from_dense(torch.eye(2)).shape = (1, 1)


@pytest.mark.parametrize("kind,dim", FORMATS)
def test_from_dense_refuses(kind, dim):
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        kind.from_dense([[1.0]])
    with pytest.raises(TypeError, match="weight must be floating point, got int64"):
        kind.from_dense(torch.ones((2,) * dim, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=f"weight must have {dim} dimensions, got shape \\(2, 2, 2\\)"
    ):
        kind.from_dense(torch.ones(2, 2, 2))
    weight = torch.ones((2,) * dim)
    with pytest.raises(TypeError, match="mask must be a bool tensor, got float32"):
        kind.from_dense(weight, weight)
    with pytest.raises(TypeError, match="mask must be a bool tensor, got list"):
        kind.from_dense(weight, [True])
    with pytest.raises(ValueError, match="mask must have shape .*got \\(3,\\)"):
        kind.from_dense(weight, torch.ones(3) > 0)


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


# field -> broken value -> what the message says, for a weight of 2 rows, 3 columns, 3 entries
BROKEN = [
    ("offsets", torch.tensor([0, 1, 3]), TypeError, "must be int32, got int64"),
    ("offsets", int32(0, 1, 3)[None], ValueError, "must have 1 dimension, got \\(1, 3\\)"),
    ("offsets", int32(0, 3), ValueError, "expected 3 .*offsets, got 2"),
    ("offsets", int32(1, 1, 3), ValueError, "must start at 0, got 1"),
    ("offsets", int32(0, 1, 4), ValueError, "must end at 3, the number of .*, got 4"),
    ("offsets", int32(0, 4, 3), ValueError, "must not decrease, but does at 2"),
    ("indices", torch.tensor([1, 0, 2]), TypeError, "must be int32, got int64"),
    ("indices", int32(1, 0, 2)[None], ValueError, "must have 1 dimension, got \\(1, 3\\)"),
    ("indices", int32(1, 0, 3), ValueError, "must be in \\[0, 3\\), got 3"),
    ("indices", int32(1, -1, 2), ValueError, "must be in \\[0, 3\\), got -1"),
    ("indices", int32(1, 2, 2), ValueError, "must increase strictly inside a row"),
    ("indices", int32(1, 2, 0), ValueError, "must increase strictly inside a row"),
    (
        "values",
        torch.zeros(3, dtype=torch.int32),
        TypeError,
        "values must be floating point, got int32",
    ),
    ("values", torch.zeros(2), ValueError, "values must have shape .*, got \\(2,\\)"),
    ("values", torch.zeros(3, device="meta"), ValueError, "values on meta, indices on cpu"),
    ("shape", (2, -3), ValueError, "shape must be"),
    ("shape", (2, 3, 4, 5, 6), ValueError, "shape must be"),
    ("shape", (2, 2), ValueError, "must be in \\[0, 2\\), got 2"),
]


@pytest.mark.parametrize("field,value,error,message", BROKEN)
def test_validate_names_the_broken_invariant(field, value, error, message):
    weight = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]])
    good = Kernelwise.from_dense(weight[:, :, None, None]).validate()
    name = {"offsets": "filter_offsets", "indices": "channels"}.get(field, field)
    if field == "values" and value.dim() == 1 and value.numel() == 3:
        value = value.reshape(3, 1, 1)
    if field == "shape" and len(value) == 2:
        value = (*value, 1, 1)
    broken = dataclasses.replace(good, **{name: value})
    with pytest.raises(error, match=f"Kernelwise: .*{message}"):
        broken.validate()


def bytes_of(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.uint8)


# The good one: values [3, 4, 2], columns [0, 2, 1], segments [[1, 1], [0, 0]], offsets to (3, 2).
BROKEN_TILES = [
    ("columns", int32(0, 2, 1), TypeError, "columns must be uint8, got int32"),
    ("columns", bytes_of(0, 3, 1), ValueError, "columns reach 3, beyond shape"),
    ("columns", bytes_of(2, 0, 1), ValueError, "columns must rise inside a segment"),
    ("columns", bytes_of(2, 2, 1), ValueError, "columns must rise inside a segment"),
    ("columns", bytes_of(0, 2, 1)[None], ValueError, "columns must be"),
    ("segments", bytes_of(1, 1, 0, 0), ValueError, "segments must be"),
    ("segments", bytes_of(1, 0, 0, 0).view(2, 2), ValueError, "count different entries"),
    ("segments", bytes_of(1, 1, 1, 0).view(2, 2), ValueError, "a row stands twice"),
    ("segments", bytes_of(1, 1, 2, 0).view(2, 2), ValueError, "segments reach 2, beyond shape"),
    ("segments", bytes_of(1, 1, 99, 0).view(2, 2), ValueError, "name rows beyond tile"),
    ("offsets", torch.tensor([[0, 0], [3, 2]]), TypeError, "offsets must be int32, got int64"),
    ("offsets", int32(0, 0, 3, 2, 3, 2).view(3, 2), ValueError, "offsets must be"),
    ("offsets", int32(0, 0, 3, 1).view(2, 2), ValueError, "offsets must rise from"),
    ("offsets", int32(0, 1, 3, 2).view(2, 2), ValueError, "offsets must rise from"),
    ("values", torch.zeros(2), ValueError, "values must have shape .*, got \\(2,\\)"),
    ("values", torch.zeros(3, dtype=torch.int32), TypeError, "must be floating point, got int32"),
    ("values", torch.zeros(3, device="meta"), ValueError, "values on meta, indices on cpu"),
    ("shape", (2, -3), ValueError, "shape must be"),
    ("shape", (2, 2), ValueError, "columns reach 2, beyond shape"),
    ("tile", (16, 0), ValueError, "tile must be within"),
    ("tile", (16, 999), TypeError, "columns must be int16, got uint8"),
]


@pytest.mark.parametrize("field,value,error,message", BROKEN_TILES)
def test_validate_names_what_is_broken_in_tiles(field, value, error, message):
    weight = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]])
    good = Unstructured.from_dense(weight).validate()
    assert good.segments.tolist() == [[1, 1], [0, 0]]
    with pytest.raises(error, match=f"Unstructured: .*{message}"):
        dataclasses.replace(good, **{field: value}).validate()


@pytest.mark.parametrize("kind", [Unstructured, Kernelwise])
def test_validate_wants_one_device(kind):
    good = kind.from_dense(torch.ones(2, 3) if kind is Unstructured else torch.ones(2, 3, 1, 1))
    name = "segments" if kind is Unstructured else "filter_offsets"
    other = getattr(good, name).to("meta")
    with pytest.raises(ValueError, match=f"{name} on meta, .* on cpu"):
        dataclasses.replace(good, **{name: other}).validate()


@given(
    weights(2),
    st.integers(1, 256),
    st.one_of(st.integers(1, 40), st.integers(257, 400)),
)
@settings(deadline=None, max_examples=60)
def test_any_tile_holds_every_weight(weight, rows, columns):
    packed = Unstructured.from_dense(weight, tile=(rows, columns)).validate()
    assert torch.equal(packed.to_dense(), weight)
    counts = packed.segments[:, 1].long()
    same_tile = (
        torch.repeat_interleave(
            torch.arange(packed.offsets.shape[0] - 1), packed.offsets[:, 1].diff().long()
        )
        .diff()
        .eq(0)
    )
    assert bool((counts.diff()[same_tile] <= 0).all())  # long rows first


def test_both_packers_agree(monkeypatch):
    mask = torch.rand(70, 600) < 0.2
    for tile in [(16, 256), (7, 300), (256, 32768)]:
        compiled = _packing.tile_pattern(mask, tile)
        with monkeypatch.context() as patch:
            patch.setattr("liveweight._library.pack", None)
            plain = _packing.tile_pattern(mask, tile)
        for a, b in zip(compiled, plain, strict=True):
            assert a.dtype == b.dtype and torch.equal(a.long(), b.long())


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.98])
def test_memory_of_single_weights(sparsity):
    weight = torch.randn(512, 1024) * (torch.rand(512, 1024) >= sparsity)
    packed = Unstructured.from_dense(weight)
    assert packed.nbytes <= 1.05 * 6 * packed.density * weight.numel()
