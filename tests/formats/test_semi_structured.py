"""SemiStructured: packing round trips, its layout is the tensor cores', bad fields are named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from liveweight.formats import SemiStructured
from liveweight.formats import semi_structured as layout
from liveweight.formats.delta import is_filler
from liveweight.ops.semi_structured_torch import pack_for


@st.composite
def masks(draw) -> torch.Tensor:
    """A mask [N, K] bool with at most two of four neighbours."""
    N, K = draw(st.integers(0, 40)), draw(st.integers(0, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    order = torch.rand(N, -(-K // 4), 4, generator=generator).argsort(-1)
    kept = order < torch.randint(0, 3, (N, -(-K // 4), 1), generator=generator)
    return kept.flatten(1)[:, :K] if K else torch.zeros(N, 0, dtype=torch.bool)


@settings(max_examples=60, deadline=None)
@given(masks(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_packing_keeps_every_entry(mask, dtype):
    weight = torch.randn(mask.shape).to(dtype)
    kept = weight.masked_fill(~mask, 0)
    by_zero, by_mask = SemiStructured.from_dense(kept), SemiStructured.from_dense(weight, mask)
    for packed in (by_zero, by_mask):
        packed.validate()
        assert torch.equal(packed.to_dense(), kept)
        assert packed.values.dtype == dtype and packed.shape == tuple(mask.shape)
    assert torch.equal(by_zero.meta, by_mask.meta)
    assert torch.equal(layout.take(kept, by_zero.meta), by_zero.values)


def test_sizes():
    packed = SemiStructured.from_dense(torch.zeros(17, 130, dtype=torch.bfloat16))
    assert packed.values.shape == (2, 2, 4, 32, 8) and packed.meta.shape == (2, 2, 32, 2)
    assert packed.nbytes == 2 * 2 * (2048 + 256)
    assert packed.density == 0
    assert SemiStructured.from_dense(torch.tensor([[1.0, 2, 0, 0]])).density == 0.5
    assert SemiStructured.from_dense(torch.zeros(0, 4)).density == 0


def test_a_mask_keeps_zeros_and_minus_zero_becomes_zero():
    weight = torch.tensor([[0.0, -0.0, 5.0, 6.0], [7.0, 0.0, 0.0, -0.0]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    packed = SemiStructured.from_dense(weight, mask).validate()
    assert not packed.to_dense().any()
    assert not packed.to_dense().signbit().any()
    assert int((~is_filler(packed.values)).sum()) == 4  # what the mask keeps is no filler
    assert packed.density == 0.5
    codes = layout.read_codes(packed.meta)
    assert layout.columns_of(codes[:2, 0]).tolist() == [[0, 1], [2, 3]]


def test_the_dense_copy_has_a_gradient():
    packed = SemiStructured.from_dense(torch.eye(5, 9))
    grad = torch.randn(5, 9)
    packed.values.requires_grad_()
    packed.to_dense().backward(grad)
    kept = ~is_filler(packed.values)
    assert int(kept.sum()) == 5
    assert torch.equal(packed.values.grad, layout.take(grad, packed.meta) * kept)


def test_nan_is_kept():
    weight = torch.tensor([[0.0, float("nan"), 0.0, float("-inf")]])
    packed = SemiStructured.from_dense(weight).validate()
    assert torch.equal(packed.to_dense().nan_to_num(7.0), weight.nan_to_num(7.0))


def test_codes_name_the_kept_columns():
    for mask, code in enumerate(layout.CODES):
        kept = [i for i in range(4) if mask >> i & 1]
        if len(kept) > 2:
            assert code == 0
            continue
        first, second = code & 3, code >> 2
        assert first < second and set(kept) <= {first, second}


def fragments(weight: torch.Tensor, step: int) -> tuple[list, list]:
    """Registers (a, meta with selector step % 2) of each lane for 16 rows and 32 columns.

    Written after the PTX manual's figures for mma.sp.m16n8k32: lane 4 g + t holds in a[0] the kept
    of row g, columns 4 t to 4 t + 3; in a[1] of row g + 8; in a[2] and a[3] the same, 16 columns
    on. Lanes 2 s and 2 s + 1 of a group hold, for selector s, the index pairs of columns 0 to 15
    and 16 to 31: row g in the lower half, row g + 8 in the upper.
    """
    block = weight[:16, 32 * step : 32 * step + 32]
    a, meta = [], []
    for lane in range(32):
        g, t = divmod(lane, 4)
        registers = []
        for row, column in ((g, 4 * t), (g + 8, 4 * t), (g, 4 * t + 16), (g + 8, 4 * t + 16)):
            four = block[row, column : column + 4]
            registers.append(four[four != 0].tolist())
        a.append(registers)
        if t // 2 != step % 2:
            meta.append(None)
            continue
        word = 0
        for half, row in enumerate((g, g + 8)):
            for j in range(4):
                column = 16 * (t % 2) + 4 * j
                places = block[row, column : column + 4].nonzero().flatten().tolist()
                word |= (places[0] | places[1] << 2) << (16 * half + 4 * j)
        meta.append(word)
    return a, meta


def test_lanes_find_the_registers_of_mma_sp():
    order = torch.rand(16, 32, 4).argsort(-1)
    weight = (torch.arange(1.0, 16 * 128 + 1).view(16, 32, 4) * (order < 2)).flatten(1)
    packed = SemiStructured.from_dense(weight)
    for step in range(4):
        a, meta = fragments(weight, step)
        assert packed.values[0, 0, step].view(32, 4, 2).tolist() == a
        words = packed.meta[0, 0, :, step // 2].tolist()
        for lane, word in enumerate(meta):
            assert word is None or words[lane] & 0xFFFFFFFF == word


@pytest.mark.parametrize("shape", [(96, 320), (32, 64), (90, 300)])
def test_repacking_for_cutlass_gives_what_torch_packs(shape):
    order = torch.rand(shape[0], -(-shape[1] // 4), 4).argsort(-1)
    weight = torch.randn(shape).bfloat16() * (order < 2).flatten(1)[:, : shape[1]]
    packed = SemiStructured.from_dense(weight)
    got = pack_for("cutlass", packed.values, packed.meta, packed.shape)
    padded = torch.nn.functional.pad(weight, (0, -shape[1] % 64, 0, -shape[0] % 32))
    pairs, meta = sparse_semi_structured_from_dense_cutlass(padded)
    assert got[0].shape == pairs.shape and got[0].is_contiguous()
    if shape != (90, 300):  # groups of zeros may name other columns
        assert torch.equal(got[0], pairs) and torch.equal(got[1], meta)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*got), padded)


def test_messages():
    weight = torch.zeros(20, 200)
    weight[3, 4:7] = 1
    with pytest.raises(ValueError, match=r"at most 2 of 4 .* got 3 in row 3, columns 4 to 7"):
        SemiStructured.from_dense(weight)
    with pytest.raises(ValueError, match=r"got 3 in row 0, columns 4 to 6"):
        SemiStructured.from_dense(torch.ones(1, 7), torch.tensor([[0, 0, 0, 0, 1, 1, 1]]).bool())
    with pytest.raises(TypeError, match="weight must be floating point, got int64"):
        SemiStructured.from_dense(torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must have shape \(1, 2\), got \(2, 2\)"):
        SemiStructured.from_dense(torch.ones(1, 2), torch.ones(2, 2, dtype=torch.bool))


def test_validate_names_what_is_wrong():
    packed = SemiStructured.from_dense(torch.eye(20, 200))

    def broken(**fields) -> SemiStructured:
        return dataclasses.replace(packed, **fields)

    with pytest.raises(TypeError, match="meta must be int32, got int64"):
        broken(meta=packed.meta.long()).validate()
    with pytest.raises(ValueError, match=r"meta must have shape \(2, 2, 32, 2\), got \(1, 2"):
        broken(meta=packed.meta[:1]).validate()
    with pytest.raises(ValueError, match=r"values must have shape \(2, 2, 4, 32, 8\), got"):
        broken(values=packed.values[..., :4]).validate()
    with pytest.raises(ValueError, match=r"rising columns .* got code 5 in row 8, columns 0 to 3"):
        meta = packed.meta.clone()
        meta[0, 0, 0, 0] = meta[0, 0, 0, 0] & ~(15 << 16) | 5 << 16
        broken(meta=meta).validate()
    with pytest.raises(ValueError, match=r"values beyond shape \(20, 200\) must be 0"):
        values = packed.values.clone()
        values[1, 0, 0, 31] = 1
        broken(values=values).validate()
    with pytest.raises(ValueError, match=r"values must have shape \(1, 2, 4, 32, 8\)|meta must"):
        broken(shape=(16, 200)).validate()
