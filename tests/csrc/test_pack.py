"""CSR patterns and bit masks, compiled and in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveweight import _library, _packing

CASES = [(0, 0), (0, 5), (4, 0), (1, 1), (3, 8), (5, 17), (63, 129)]


@pytest.fixture(params=["compiled", "numpy"])
def packer(request, monkeypatch):
    """_packing with the compiled module, then without."""
    if request.param == "numpy":
        monkeypatch.setattr(_library, "pack", None)
    elif _library.pack is None:
        pytest.skip(f"pack: {_library.status()['pack']}")
    return _packing


@pytest.fixture
def compiled():
    if _library.pack is None:
        pytest.skip(f"pack: {_library.status()['pack']}")
    return _library.pack


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_csr_pattern_is_torchs(packer, shape, density):
    mask = torch.rand(shape) < density
    row_offsets, columns = packer.csr_pattern(mask)
    assert row_offsets.dtype == columns.dtype == torch.int32
    counts = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
    assert torch.equal(row_offsets.long(), counts)
    assert torch.equal(columns.long(), mask.nonzero()[:, 1])


def test_csr_pattern_reads_any_strides_and_any_nonzero_byte(packer):
    mask = (torch.rand(19, 11) < 0.5).t()
    for same in (mask, mask.to(torch.uint8) * 255):
        row_offsets, columns = packer.csr_pattern(same)
        assert torch.equal(columns.long(), mask.nonzero()[:, 1])
        assert int(row_offsets[-1]) == int(mask.sum())


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (3, 43)])
def test_bits_are_little_endian_and_come_back(packer, shape):
    mask = torch.rand(shape) < 0.5
    bits = packer.pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.numpy().tolist() == np.packbits(mask.numpy(), bitorder="little").tolist()
    assert torch.equal(packer.unpack_bits(bits, mask.numel()), mask.flatten())


def test_first_entry_is_the_lowest_bit(packer):
    mask = torch.tensor([True, False, False, True, False, False, False, False, False, True])
    assert packer.pack_bits(mask).tolist() == [9, 2]


def test_wrong_arguments(packer):
    with pytest.raises(TypeError, match="mask must be bool, uint8, got float32"):
        packer.csr_pattern(torch.ones(2, 2))
    with pytest.raises(ValueError, match="mask must have 2 dimensions, got shape"):
        packer.csr_pattern(torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool, uint8, got int64"):
        packer.pack_bits(torch.ones(2, dtype=torch.int64))
    bits = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="17 bits need 3 bytes, got 2"):
        packer.unpack_bits(bits, 17)
    with pytest.raises(ValueError, match="8 bits need 1 bytes, got 2"):
        packer.unpack_bits(bits, 8)
    with pytest.raises(ValueError, match="-1 bits need 0 bytes"):
        packer.unpack_bits(bits, -1)


def test_more_columns_than_int32_counts_is_an_error(packer):
    wide = torch.zeros(1, 1, dtype=torch.bool).expand(1, 2**31)[:0]  # no rows: no memory
    with pytest.raises(ValueError, match="int32 indices hold at most 2147483647 entries"):
        packer.csr_pattern(wide)


def test_compiled_module_checks_for_itself(compiled):
    with pytest.raises(TypeError, match="mask must be bool or uint8, got float64"):
        compiled.csr_pattern(np.ones((2, 2)))
    with pytest.raises(ValueError, match="mask must have 2 dimensions, got 1"):
        compiled.csr_pattern(np.ones(2, dtype=bool))
    with pytest.raises(ValueError, match="9 bits need 2 bytes, got 1"):
        compiled.unpack_bits(np.zeros(1, dtype=np.uint8), 9)


@given(st.lists(st.booleans(), max_size=70))
@settings(max_examples=60, deadline=None)
def test_round_trip(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    assert torch.equal(_packing.unpack_bits(_packing.pack_bits(mask), len(bits)), mask)
