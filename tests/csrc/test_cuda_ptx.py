"""Each wrapper of csrc/cuda/ptx*.cuh: the emulator's model and the GPU's instruction agree.

Fragments are laid out here from the PTX manual's formulas, independently of ptx_matrix.cuh.
"""

from __future__ import annotations

import pytest
import torch

HALVES = [torch.bfloat16, torch.float16]
GROUP = torch.arange(32) // 4  # groupID of the manual
TURN = torch.arange(32) % 4  # threadID_in_group


def words(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Pack two tensors of 16-bit elements into words, `low` in the lower half."""
    pair = torch.stack([low, high], dim=-1).contiguous()
    return pair.view(torch.int32).squeeze(-1)


def fragment_a(a: torch.Tensor) -> torch.Tensor:
    """[16, 16] -> [32, 4]: element i of a lane stands at these rows and columns."""
    lanes = []
    for i in range(0, 8, 2):
        row = GROUP + (0 if i in (0, 4) else 8)
        column = TURN * 2 + (8 if i >= 4 else 0)
        lanes.append(words(a[row, column], a[row, column + 1]))
    return torch.stack(lanes, dim=1)


def fragment_b(b: torch.Tensor) -> torch.Tensor:
    """[16 or 32, 8] -> [32, 2 or 4]."""
    rows = [TURN * 2 + 8 * word for word in range(b.shape[0] // 8)]
    return torch.stack([words(b[row, GROUP], b[row + 1, GROUP]) for row in rows], dim=1)


def fragment_d(d: torch.Tensor) -> torch.Tensor:
    """[16, 8] -> [32, 4]."""
    places = [(GROUP + i // 2 * 8, TURN * 2 + i % 2) for i in range(4)]
    return torch.stack([d[row, column] for row, column in places], dim=1)


def matrix_d(fragments: torch.Tensor) -> torch.Tensor:
    """[32, 4] -> [16, 8]."""
    d = torch.full((16, 8), float("nan"))
    for i in range(4):
        d[GROUP + i // 2 * 8, TURN * 2 + i % 2] = fragments[:, i]
    return d


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mma_multiplies_matrices(kernels, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    before = torch.randn(16, 8)
    want = a.double() @ b.double() + before.double()
    for _ in kernels.orders():
        d = fragment_d(before).contiguous().to(kernels.device)
        operands = [fragment_a(a).to(kernels.device), fragment_b(b).to(kernels.device)]
        kernels.probe("mma")(*operands, d, dtype == torch.float16)
        torch.testing.assert_close(matrix_d(d.cpu()).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mma_puts_every_product_in_its_place(kernels, dtype):
    # Powers of two that no other pair of rows and columns shares: every element must be exact.
    a = torch.zeros(16, 16, dtype=dtype)
    a[torch.arange(16), torch.randperm(16)] = torch.arange(1, 17).to(dtype)
    b = torch.arange(16 * 8).reshape(16, 8).to(dtype)
    d = torch.zeros(32, 4, device=kernels.device)
    operands = [fragment_a(a).to(kernels.device), fragment_b(b).to(kernels.device)]
    kernels.probe("mma")(*operands, d, dtype == torch.float16)
    assert torch.equal(matrix_d(d.cpu()), a.float() @ b.float())


def two_of_four(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dense [16, 32], kept [16, 16] and the kept ones' places among four, [16, 16]."""
    places = torch.stack([torch.randperm(4)[:2].sort().values for _ in range(128)]).reshape(16, 16)
    kept = torch.randn(16, 16).to(dtype)
    columns = torch.arange(16) // 2 * 4 + places
    return torch.zeros(16, 32, dtype=dtype).scatter(1, columns, kept), kept, places


def metadata(places: torch.Tensor, selector: int) -> torch.Tensor:
    """[16, 16] -> [32] int32; lanes that contribute nothing hold all ones, which must not matter.

    Of the lanes 4g + 2 * selector and the next: the first has columns 0 to 15, the second 16 to 31,
    of row g in bits 0 to 15 and of row g + 8 in bits 16 to 31.
    """
    out = torch.full((32,), -1, dtype=torch.int64)
    for group in range(8):
        for part in range(2):
            word = 0
            for kept in range(8):
                word |= int(places[group, part * 8 + kept]) << 2 * kept
                word |= int(places[group + 8, part * 8 + kept]) << 16 + 2 * kept
            out[4 * group + 2 * selector + part] = word
    return torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32)


@pytest.mark.sanitized
@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mma_sp_multiplies_what_two_of_four_kept(kernels, dtype, selector):
    dense, kept, places = two_of_four(dtype)
    b = torch.randn(32, 8).to(dtype)
    before = torch.randn(16, 8)
    want = dense.double() @ b.double() + before.double()
    operands = [fragment_a(kept), fragment_b(b), metadata(places, selector)]
    operands = [operand.to(kernels.device) for operand in operands]
    for _ in kernels.orders():
        d = fragment_d(before).contiguous().to(kernels.device)
        kernels.probe("mma_sp")(*operands, d, selector, dtype == torch.float16)
        torch.testing.assert_close(matrix_d(d.cpu()).double(), want, rtol=1e-5, atol=1e-5)


def test_mma_sp_never_meets_what_was_not_kept(kernels):
    dense, kept, places = two_of_four(torch.bfloat16)
    column = 5
    b = torch.randn(32, 8).to(torch.bfloat16)
    b[column] = float("nan")
    operands = [fragment_a(kept), fragment_b(b), metadata(places, 0)]
    d = torch.zeros(32, 4, device=kernels.device)
    kernels.probe("mma_sp")(*(o.to(kernels.device) for o in operands), d, 0, False)
    columns = torch.arange(16) // 2 * 4 + places
    assert torch.equal(matrix_d(d.cpu()).isnan().all(1), (columns == column).any(1))


def test_emulated_mma_sp_refuses_unordered_metadata(kernels):
    if not kernels.emulated:
        pytest.skip("a GPU gives undefined results")
    _, kept, places = two_of_four(torch.bfloat16)
    places[11] = places[11].reshape(8, 2).flip(1).flatten()
    operands = [fragment_a(kept), fragment_b(torch.zeros(32, 8).to(torch.bfloat16))]
    with pytest.raises(RuntimeError, match="metadata of row 11 is not in increasing order"):
        kernels.probe("mma_sp")(*operands, metadata(places, 0), torch.zeros(32, 4), 0, False)


@pytest.mark.sanitized
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_loads_four_matrices(kernels, trans):
    tile = torch.arange(256, dtype=torch.int16).reshape(32, 8)
    rows = torch.randperm(32)
    matrices = tile[rows].reshape(4, 8, 8)
    if trans:
        matrices = matrices.transpose(1, 2)
    want = [words(m[GROUP, TURN * 2], m[GROUP, TURN * 2 + 1]) for m in matrices]
    given = tile.to(kernels.device), rows.int().to(kernels.device)
    for _ in kernels.orders():
        got = kernels.probe("ldmatrix")(*given, trans)
        assert torch.equal(got.cpu(), torch.stack(want, dim=1))


@pytest.mark.sanitized
def test_cp_async_copies_or_fills_with_zeros(kernels):
    x = torch.randint(-(2**31), 2**31, (128, 4), dtype=torch.int64).int()
    valid = (torch.rand(128) < 0.7).int()
    for _ in kernels.orders():
        got = kernels.probe("copy")(x.to(kernels.device), valid.to(kernels.device))
        assert torch.equal(got.cpu(), x * valid[:, None])


@pytest.mark.sanitized
def test_cp_async_copies_single_words(kernels):
    # Not aligned to more than a word.
    x = torch.randint(-(2**31), 2**31, (129,), dtype=torch.int64).int().to(kernels.device)[1:]
    for _ in kernels.orders():
        assert torch.equal(kernels.probe("copy_words")(x), x.flip(0))


def test_no_wait_and_no_barrier_can_be_left_out(kernels):
    x = torch.randint(-(2**31), 2**31, (128, 4), dtype=torch.int64).int().to(kernels.device)
    valid = torch.ones(128, dtype=torch.int32, device=kernels.device)
    tile = torch.arange(256, dtype=torch.int16, device=kernels.device).reshape(32, 8)
    rows = torch.arange(31, -1, -1, dtype=torch.int32, device=kernels.device)
    want = kernels.probe("ldmatrix")(tile, rows, False)

    def check():
        assert torch.equal(kernels.probe("copy")(x, valid), x)
        assert torch.equal(kernels.probe("ldmatrix")(tile, rows, False), want)
        assert torch.equal(kernels.probe("copy_words")(x[:, 0].contiguous()), x[:, 0].flip(0))

    kernels.assert_every_barrier_is_needed(check, "probes_ptx.cu")


def test_rounding_is_to_the_nearest_even(kernels):
    exponents = torch.randint(-30, 40, (4096,))
    x = torch.cat([
        torch.randn(4096) * 2.0**exponents,
        torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e-8, 5.9e-8, 3.4e38, -1e39]),
        torch.tensor([float("inf"), -float("inf"), 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11]),
        torch.arange(1, 2048, 2) * 2.0**-25,  # halfway between subnormal halves
    ])  # fmt: skip
    n, device = x.numel(), kernels.device
    single = [torch.empty(n, dtype=torch.int16, device=device) for _ in HALVES]
    pairs = [torch.empty(n, dtype=torch.int32, device=device) for _ in HALVES]
    kernels.probe("round")(x.to(device), *single, *pairs)
    for dtype, one, two in zip(HALVES, single, pairs, strict=True):
        want = x.to(dtype)
        assert torch.equal(one.cpu(), want.view(torch.int16))
        assert torch.equal(two.cpu(), words(want, want.flip(0)))


def test_rounding_keeps_nan(kernels):
    x = torch.tensor([float("nan"), -float("nan"), 1.0, 2.0], device=kernels.device)
    single = [torch.empty(4, dtype=torch.int16, device=kernels.device) for _ in HALVES]
    pairs = [torch.empty(4, dtype=torch.int32, device=kernels.device) for _ in HALVES]
    kernels.probe("round")(x, *single, *pairs)
    for one, two in zip(single, pairs, strict=True):
        assert one[:2].tolist() == [0x7FFF, 0x7FFF]
        assert two[0].item() & 0xFFFF == 0x7FFF and two[3].item() >> 16 == 0x7FFF


def test_comparisons_show_nan(kernels):
    values = torch.tensor([float("nan"), -1.0, -0.0, 0.0, 2.5, float("inf"), -float("inf")])
    a, b = (v.flatten().contiguous() for v in torch.meshgrid(values, values, indexing="ij"))
    got = kernels.probe("compare")(a.to(kernels.device), b.to(kernels.device)).cpu()
    want = torch.maximum(a, b)  # NaN if either is
    for row in (got[0], got[2]):
        torch.testing.assert_close(row, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1], (a > b).float())


@pytest.mark.sanitized
def test_lanes_exchange_and_count(kernels):
    x = torch.randint(0, 2**31, (32,)) - 2**30
    y = torch.randint(0, 2**31, (32,)) - 2**30
    lane, mask = torch.arange(32), 2**32 - 1
    unsigned, other = x & mask, y & mask

    def signed(values) -> torch.Tensor:
        values = torch.as_tensor(values) & mask
        return torch.where(values >= 1 << 31, values - (1 << 32), values).expand(32)

    def permuted(a: int, b: int, selector: int) -> int:
        both, out = b << 32 | a, 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = both >> 8 * (nibble & 7) & 255
            out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
        return out

    pairs = list(zip(unsigned.tolist(), other.tolist(), strict=True))
    want = torch.stack([
        x[other % 32],
        x[lane ^ 5],
        x[torch.where(lane >= 3, lane - 3, lane)],
        x[torch.where(lane + 7 < 32, lane + 7, lane)],
        signed(sum(1 << i for i in range(32) if unsigned[i] % 3 == 0)),
        signed(x.sum()),
        signed(y.sum()),
        signed((1 << lane) - 1),
        torch.tensor([a.bit_count() for a, _ in pairs]),
        signed([permuted(a, b, a >> 7 & 0xFFFF) for a, b in pairs]),
        signed([(b << 32 | a) >> a % 32 & mask for a, b in pairs]),
        lane,
    ])  # fmt: skip
    for _ in kernels.orders():
        got = kernels.probe("lanes")(x.int().to(kernels.device), y.int().to(kernels.device)).cpu()
        for name, row, right in zip(range(12), got.long(), want, strict=True):
            assert torch.equal(row, right), f"result {name}"


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_vectors_are_loaded_and_widened(kernels, dtype):
    x = torch.randn(512).to(dtype)
    got = kernels.probe("widened")(x.to(kernels.device)).cpu()
    assert torch.equal(got[0], x.float())
    if dtype != torch.float32:
        assert torch.equal(got[1], x.float())


@pytest.mark.sanitized
def test_every_load_brings_what_is_there(kernels):
    x = torch.randint(-(2**31), 2**31, (300,), dtype=torch.int64).int()
    for _ in kernels.orders():
        for way, got in enumerate(kernels.probe("loads")(x.to(kernels.device)).cpu()):
            assert torch.equal(got, x), f"way {way}"


def test_square_roots_are_right_to_two_units_in_the_last_place(kernels):
    x = torch.cat([torch.rand(1000) * 2.0 ** torch.randint(-120, 120, (1000,)), torch.zeros(1)])
    got = kernels.probe("roots")(x.to(kernels.device)).cpu()
    torch.testing.assert_close(got.double(), x.double().sqrt(), rtol=2.0**-22, atol=0)
    bad = kernels.probe("roots")(torch.tensor([-1.0, float("nan")], device=kernels.device))
    assert bad.isnan().all()
