"""UnstructuredKernels: round trips for any weight and tile; a message per broken invariant."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveweight import reference
from liveweight.formats import UnstructuredKernels

SPECIAL = st.sampled_from([0.0, -0.0, 1.5, -2.0, 1e-40, float("inf")])


@st.composite
def weights(draw) -> torch.Tensor:
    shape = draw(st.tuples(*[st.integers(0, 5)] * 2, *[st.integers(0, 3)] * 2))
    count = int(np.prod(shape))
    values = draw(st.lists(SPECIAL, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


@given(weights(), st.none() | st.tuples(st.integers(1, 7), st.integers(1, 3) | st.just(1000)))
@settings(deadline=None, max_examples=120)
def test_round_trip(weight, tile):
    packed = UnstructuredKernels.from_dense(weight, tile=tile).validate()
    assert torch.equal(packed.to_dense(), weight)  # -0.0 == 0.0
    kept = int((weight != 0).sum())
    assert packed.values.numel() == packed.columns.numel() == kept
    assert packed.density == (kept / weight.numel() if weight.numel() else 0.0)


@given(weights(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_mask_says_what_is_kept(weight, random):
    mask = torch.tensor([random.random() < 0.5 for _ in range(weight.numel())], dtype=torch.bool)
    mask = mask.reshape(weight.shape)
    packed = UnstructuredKernels.from_dense(weight, mask).validate()
    assert packed.values.numel() == int(mask.sum())
    assert torch.equal(packed.to_dense(), torch.where(mask, weight, 0.0))


def test_small_example():
    weight = torch.zeros(3, 3, 1, 2)
    weight[0, 0, 0, 1] = 1
    weight[1, 0] = torch.tensor([2.0, 3.0])
    weight[1, 2, 0, 0] = 4
    weight[2, 1, 0, 0] = 5
    packed = UnstructuredKernels.from_dense(weight, tile=(2, 2)).validate()
    assert packed.tile == (2, 2) and packed.shape == (3, 3, 1, 2)
    assert packed.values.tolist() == [2, 3, 1, 4, 5]  # the longest run of a tile comes first
    assert packed.columns.tolist() == [0, 1, 1, 0, 2]
    assert packed.segments.tolist() == [[1, 1], [0, 0], [1, 0], [0, 0]]
    assert packed.offsets.tolist() == [[0, 0], [3, 2], [4, 3], [5, 4], [5, 4]]
    filters, columns = packed.coordinates()
    assert filters.tolist() == [1, 1, 0, 1, 2] and columns.tolist() == [0, 1, 1, 4, 2]


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9, 0.95, 0.98])
@pytest.mark.parametrize(
    "shape", [(64, 64, 3, 3), (256, 256, 3, 3), (512, 256, 1, 1), (64, 64, 5, 5)]
)
def test_memory(shape, sparsity):
    mask = torch.rand(shape) >= sparsity
    packed = UnstructuredKernels.from_dense(torch.ones(shape), mask)
    assert packed.columns.dtype is torch.uint8
    assert packed.nbytes <= 1.05 * 6 * int(mask.sum()) + 64


def test_large_kernels_take_wider_indices():
    weight = torch.randn(5, 3, 17, 17)
    packed = UnstructuredKernels.from_dense(weight).validate()
    assert packed.tile == (64, 1) and packed.columns.dtype is torch.int16
    assert torch.equal(packed.to_dense(), weight)


def test_reference_knows_the_places():
    weight = torch.randn(9, 7, 3, 2) * (torch.rand(9, 7, 3, 2) < 0.4)
    packed = UnstructuredKernels.from_dense(weight, tile=(4, 3))
    index = (packed.columns, packed.segments, packed.offsets, packed.shape, packed.tile)
    places = reference.kernel_coordinates(*index)
    filters, columns = packed.coordinates()
    assert torch.equal(places, filters * 42 + columns)
    assert torch.equal(reference.scatter_kernels(packed.values, *index), weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_survive(dtype):
    weight = torch.randn(3, 4, 2, 2).to(dtype)
    packed = UnstructuredKernels.from_dense(weight).validate()
    assert packed.values.dtype == dtype and torch.equal(packed.to_dense(), weight)


def test_values_can_be_replaced_copied_and_pickled():
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    packed = UnstructuredKernels.from_dense(weight)
    assert not packed.values.requires_grad
    ones = dataclasses.replace(packed, values=torch.ones_like(packed.values))
    assert torch.equal(ones.to_dense(), (weight != 0).float())
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other.validate().to_dense(), weight)


def test_from_dense_refuses():
    weight = torch.ones(2, 2, 2, 2)
    with pytest.raises(ValueError, match=r"weight must have 4 dimensions, got shape \(2, 2\)"):
        UnstructuredKernels.from_dense(torch.ones(2, 2))
    with pytest.raises(TypeError, match="mask must be a bool tensor, got float32"):
        UnstructuredKernels.from_dense(weight, weight)
    with pytest.raises(ValueError, match=r"mask must have shape .*got \(2, 2\)"):
        UnstructuredKernels.from_dense(weight, torch.ones(2, 2) > 0)
    for tile in [(0, 1), (1,), 3, (1.5, 1)]:
        with pytest.raises(ValueError, match="tile must be two whole numbers >= 1"):
            UnstructuredKernels.from_dense(weight, tile=tile)
    with pytest.raises(ValueError, match="tile may have 256 filters and 32768 columns, got 257, 4"):
        UnstructuredKernels.from_dense(weight, tile=(257, 1))
    with pytest.raises(ValueError, match="got 2, 36000"):
        UnstructuredKernels.from_dense(weight, tile=(2, 9000))


def uint8(*numbers: int | list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.uint8)


def int32(*numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


# For the weight of test_small_example.
BROKEN = [
    ("columns", torch.tensor([0, 1, 1, 0, 2]), TypeError, "columns must be uint8, got int64"),
    ("columns", uint8(0, 1, 1, 0, 2)[None], ValueError, r"must have shape \[nnz\], got \(1, 5\)"),
    ("columns", uint8(0, 1, 4, 0, 2), ValueError, "columns must lie in their tile, got 4"),
    ("columns", uint8(0, 1, 1, 2, 2), ValueError, "columns must lie in their tile, got 2"),
    ("columns", uint8(1, 1, 1, 0, 2), ValueError, "must increase strictly inside a segment"),
    ("segments", uint8(1, 1, 0, 0), ValueError, r"segments must have shape \[n, 2\], got \(4,\)"),
    ("segments", uint8([1, 1], [0, 0], [2, 0], [0, 0]), ValueError, "outside their block"),
    ("segments", uint8([1, 1], [0, 0], [1, 0], [1, 0]), ValueError, "outside their block"),
    ("segments", uint8([1, 1], [1, 0], [1, 0], [0, 0]), ValueError, "a row twice"),
    ("segments", uint8([0, 0], [1, 1], [1, 0], [0, 0]), ValueError, "must not grow"),
    ("segments", uint8([1, 2], [0, 0], [1, 0], [0, 0]), ValueError, "do not add up"),
    ("offsets", int32([0, 0], [3, 2], [5, 4]), ValueError, "expected 5 offsets, got 3"),
    (
        "offsets",
        int32([0, 1], [3, 2], [4, 3], [5, 4], [5, 4]),
        ValueError,
        r"go from \[0, 0\] to \[5, 4\], .*got \[0, 1\]",
    ),
    (
        "offsets",
        int32([0, 0], [3, 2], [2, 3], [5, 4], [5, 4]),
        ValueError,
        "must not decrease",
    ),
    ("values", torch.zeros(4), ValueError, r"values must have shape \(5,\), got \(4,\)"),
    ("values", torch.zeros(5, dtype=torch.int32), TypeError, "values must be floating point"),
    ("values", torch.zeros(5, device="meta"), ValueError, "values on meta, indices on cpu"),
    ("shape", (3, 3, 2), ValueError, "shape must be"),
    ("shape", (9, 3, 1, 2), ValueError, "expected 11 offsets, got 5"),
    ("tile", (0, 2), ValueError, "tile must be two whole numbers"),
]


@pytest.mark.parametrize("field,value,error,message", BROKEN)
def test_validate_names_the_broken_invariant(field, value, error, message):
    good = UnstructuredKernels(
        torch.tensor([2.0, 3, 1, 4, 5]),
        uint8(0, 1, 1, 0, 2),
        uint8([1, 1], [0, 0], [1, 0], [0, 0]),
        int32([0, 0], [3, 2], [4, 3], [5, 4], [5, 4]),
        (3, 3, 1, 2),
        (2, 2),
    ).validate()
    broken = dataclasses.replace(good, **{field: value})
    with pytest.raises(error, match=f"UnstructuredKernels: .*{message}"):
        broken.validate()


def test_validate_wants_one_device():
    good = UnstructuredKernels.from_dense(torch.ones(2, 3, 1, 1))
    with pytest.raises(ValueError, match="offsets on meta, columns on cpu"):
        dataclasses.replace(good, offsets=good.offsets.to("meta")).validate()
