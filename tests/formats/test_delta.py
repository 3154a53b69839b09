"""Delta: round trips for any weight and layout, and one message per broken invariant."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveweight.formats import Delta, delta_layout
from liveweight.formats.delta import is_filler

SPECIAL = torch.tensor([1.5, -2.0, 1e-40, float("inf"), 0.25, -3.0])


@st.composite
def cases(draw):
    """Return a weight with -0.0 among its zeros, and a layout for it."""
    rows, columns = draw(st.integers(0, 40)), draw(st.integers(0, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    density = draw(st.sampled_from([0.0, 0.003, 0.03, 0.2, 1.0]))
    kept = torch.rand(rows, columns, generator=generator) < density
    which = torch.randint(0, SPECIAL.numel(), (rows, columns), generator=generator)
    zeros = torch.where(torch.rand(rows, columns, generator=generator) < 0.5, 0.0, -0.0)
    weight = torch.where(kept, SPECIAL[which], zeros)
    given_layout = {
        "bits": draw(st.sampled_from([None, 4, 5, 6, 8])),
        "lanes": draw(st.sampled_from([None, 1, 2, 4, 8, 16, 32])),
        "part": draw(st.sampled_from([None, 8, 64, 32768])),
        "head": draw(st.sampled_from([None, 0, 4])),
    }
    if given_layout["lanes"] in (None, 8, 32) and draw(st.booleans()):
        given_layout["tokens"] = 8
    return weight, given_layout


@given(cases(), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
@settings(deadline=None, max_examples=120)
def test_round_trip(case, dtype):
    weight, layout = case[0].to(dtype), case[1]
    packed = Delta.from_dense(weight, **layout).validate()
    assert torch.equal(packed.to_dense(), weight)  # -0.0 == 0.0
    kept = int((weight != 0).sum())
    assert packed.density == (kept / weight.numel() if weight.numel() else 0.0)
    for at, key in enumerate(("bits", "lanes", "part", "head")):
        assert layout[key] in (None, packed.layout[at])
    assert packed.layout[4] == (8 if "tokens" in layout else 1)


@given(cases())
@settings(deadline=None, max_examples=40)
def test_mask_says_what_is_kept(case):
    weight, layout = case
    mask = torch.arange(weight.numel()).reshape(weight.shape) % 3 == 0
    packed = Delta.from_dense(weight, mask, **layout).validate()
    assert torch.equal(packed.to_dense(), torch.where(mask, weight, 0.0))
    index, row, column = packed.entries()
    assert index.numel() == int(mask.sum())
    assert torch.equal(packed.values[index], weight[row, column])


def test_small_example():
    weight = torch.zeros(2, 64)
    weight[0, 3], weight[1, 1], weight[1, 40], weight[1, 42] = 1.0, 2.0, 3.0, -4.0
    packed = Delta.from_dense(weight, bits=4, lanes=1, head=0)
    # Row 1 is longer and stands first; from 1 to 40 are two fillers, at 16 and 31.
    assert packed.order[0].tolist()[:3] == [1, 0, -1]
    assert packed.offsets.tolist() == [[0, 0], [1, 1]]
    assert packed.values[:8].tolist() == [2.0, 0.0, 0.0, 3.0, -4.0, 0.0, 0.0, 0.0]
    assert is_filler(packed.values[:8]).tolist() == [False, True, True, False, False] + [True] * 3
    assert packed.deltas[0].item() == 15 << 4 | 15 << 8 | 9 << 12 | 2 << 16
    assert packed.starts[0, :2].tolist() == [1, 3]


def test_kept_negative_zero_is_stored_as_zero():
    packed = Delta.from_dense(torch.tensor([[-0.0, 1.0]]), torch.ones(1, 2) > 0).validate()
    index, _, column = packed.entries()
    assert column.tolist() == [0, 1] and not torch.signbit(packed.values[index[0]])


def test_layout_suits_the_weight():
    def layout(N, K, density):
        return Delta.from_dense((torch.rand(N, K) < density).bfloat16()).layout

    assert [layout(256, 4096, d)[0] for d in (0.25, 0.1, 0.05, 0.01)] == [4, 5, 6, 8]
    assert layout(8192, 512, 0.2)[1] <= 4 and layout(64, 8192, 0.2)[1] == 32
    assert layout(4, 8, 1.0)[1] == 1  # streams of less than 32 entries are mostly filling
    assert layout(64, 8192, 0.2)[3] == 4 and layout(64, 512, 0.02)[3] == 0
    assert layout(2, 70000, 0.01)[2] == 23336 and layout(2, 13, 0.5)[2] == 16


def test_bytes_of_a_kept_weight_at_ninety_percent():
    weight = (torch.rand(2048, 8192) < 0.1).bfloat16()
    kept = int(weight.sum())
    assert Delta.from_dense(weight, lanes=4).nbytes / kept < 2.85


def test_streams_of_classes_keep_to_them():
    packed = Delta.from_dense((torch.rand(64, 999) < 0.2).bfloat16(), tokens=4, lanes=16).validate()
    layout = delta_layout.Layout(*packed.shape, *packed.layout)
    index = (packed.deltas, packed.starts, packed.order, packed.offsets)
    column = delta_layout.unpack(*index, layout)[1]
    kept = ~is_filler(packed.values)
    lane = torch.arange(column.numel()) // 8 % 32
    assert torch.equal(column[kept] % 8, lane[kept] % 8)


def test_packing_refuses_what_it_does_not_know():
    weight = torch.ones(2, 3)
    for message, arguments in [
        ("bits must be one of", {"bits": 7}),
        ("lanes must be a power of two", {"lanes": 3}),
        ("part must be a multiple of 8", {"part": 12}),
        ("head must be 0 or 4", {"head": 2}),
        ("8 classes need as many lanes or more, got 4", {"lanes": 4, "tokens": 3}),
        ("part must be a multiple of 8", {"part": 65536}),
        ("mask must have shape", {"mask": torch.ones(3, 2) > 0}),
    ]:
        with pytest.raises(ValueError, match=message):
            Delta.from_dense(weight, **arguments)
    with pytest.raises(TypeError, match="weight must be floating point, got int64"):
        Delta.from_dense(torch.ones(2, 3, dtype=torch.int64))


def broken(packed: Delta):
    """Yield (message, error, packed with one broken invariant)."""
    change = dataclasses.replace
    far = packed.starts.clone()
    far[0, 0] = 39
    twice = packed.order.clone()
    twice[0, 1] = twice[0, 0]
    down = packed.offsets.clone()
    down[0] = 1
    full = torch.ones_like(packed.values)
    more = packed.offsets.clone()
    more[-1, 1] += 1
    words = torch.cat((packed.deltas, packed.deltas[:32]))
    yield r"shape must be \(N, K\)", ValueError, change(packed, shape=(3,))
    yield (
        r"layout must be \(bits, lanes, part, head, classes\)",
        ValueError,
        change(packed, layout=(4, 1)),
    )
    yield "deltas must be int32, got int64", TypeError, change(packed, deltas=packed.deltas.long())
    yield (
        r"starts must be \[1, 32\], got \[1, 31\]",
        ValueError,
        change(packed, starts=packed.starts[:, :31]),
    )
    yield "values must be floating point", TypeError, change(packed, values=packed.values.int())
    yield "values must have shape", ValueError, change(packed, values=packed.values[1:])
    yield "expected .* deltas, got", ValueError, change(packed, deltas=packed.deltas[1:])
    yield "offsets must rise", ValueError, change(packed, offsets=down)
    yield (
        "other words than their groups need",
        ValueError,
        change(packed, offsets=more, deltas=words),
    )
    yield "columns must lie in their part", ValueError, change(packed, starts=far)
    yield "order must name every row once", ValueError, change(packed, order=twice)
    yield "a stream of no row must hold fillers alone", ValueError, change(packed, values=full)


@pytest.mark.parametrize("head", [0, 4])
def test_validate_names_what_is_wrong(head):
    weight = torch.zeros(3, 40)
    weight[0, ::4], weight[1, 7], weight[2, 3:9] = 1.0, 2.0, 3.0
    packed = Delta.from_dense(weight, bits=4, lanes=1, head=head).validate()
    for message, error, bad in broken(packed):
        with pytest.raises(error, match=message):
            bad.validate()
    deltas = torch.zeros_like(packed.deltas)
    with pytest.raises(ValueError, match="an entry of W must be stored once"):
        dataclasses.replace(packed, deltas=deltas).validate()


@pytest.mark.gpu
def test_packs_on_the_gpu(gpu):
    weight = torch.randn(300, 5000) * (torch.rand(300, 5000) < 0.1)
    here, there = Delta.from_dense(weight), Delta.from_dense(weight.to(gpu)).validate()
    for name in ("values", "deltas", "starts", "order", "offsets"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu())
