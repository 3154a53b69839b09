"""2:4 in CUDA C++: packing, its inverse, and the product for few tokens; emulated and on a GPU."""

from __future__ import annotations

import pytest
import torch

from liveweight import reference
from liveweight.formats import semi_structured as layout

HALVES = [torch.bfloat16, torch.float16]


def two_of_four(N: int, K: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    groups = (N, -(-K // 4))
    order = torch.rand(*groups, 4, device=device).argsort(-1)
    # Most groups keep two, some fewer.
    few = torch.randint(0, 5, (*groups, 1), device=device).clamp(max=2)
    return (torch.randn(N, K, device=device) * (order < few).flatten(1)[:, :K]).to(dtype)


def misaligned(x: torch.Tensor, offset: int, device: torch.device) -> torch.Tensor:
    """Return a copy that begins `offset` elements after a 16-byte boundary, and ends its memory."""
    storage = torch.empty(x.numel() + offset, dtype=x.dtype, device=device)
    return storage[offset:].view(x.shape).copy_(x)


def check_packing(kernels, weight: torch.Tensor, mask: torch.Tensor | None, offset: int) -> None:
    there = misaligned(weight, offset, kernels.device)
    where = None if mask is None else misaligned(mask, offset, kernels.device)
    values, meta, crowded = kernels.op("semi_structured_pack")(there, where)
    want = layout.pack(weight, mask)
    assert int(crowded) == int(want[2]) == 0
    assert torch.equal(values.cpu().view(torch.int16), want[0].view(torch.int16))  # -0 is not +0
    assert torch.equal(meta.cpu(), want[1])
    dense = kernels.op("semi_structured_to_dense")(values, meta, list(weight.shape))
    kept = weight if mask is None else weight.masked_fill(~mask, 0)
    assert torch.equal(dense.cpu(), kept)
    whole = torch.randn(weight.shape).to(weight.dtype)
    taken = kernels.op("semi_structured_take")(misaligned(whole, offset, kernels.device), meta)
    assert torch.equal(taken.cpu(), layout.take(whole, want[1]))


def check_product(kernels, x, weight, bias, activation=0, batch_last=False, offset=0) -> None:
    values, meta, _ = layout.pack(weight, None)
    args = (len(weight), bias, activation, batch_last)
    moved = [misaligned(x, offset, kernels.device), values.to(kernels.device)]
    there = None if bias is None else bias.to(kernels.device)
    got = kernels.op("semi_structured_linear")(
        *moved, meta.to(kernels.device), len(weight), there, activation, batch_last
    )
    wide = None if bias is None else bias.double()
    want = reference.semi_structured_linear(
        x.double(), values.double(), meta, args[0], wide, activation, batch_last
    )
    assert got.shape == want.shape and got.dtype == x.dtype
    assert (got.t() if batch_last else got).is_contiguous()
    exact = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-11
    torch.testing.assert_close(
        got.cpu().double(), want, rtol=exact, atol=1e-4 + exact / 64, equal_nan=True
    )


PACKED = [(16, 128), (1, 1), (17, 129), (33, 260), (5, 126), (0, 8), (8, 0), (40, 512)]


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_packing_is_the_references_to_the_bit(kernels, dtype):
    for shape in PACKED:
        weight = two_of_four(*shape, dtype)
        weight[torch.rand(shape) < 0.1] *= 0  # zeros of both signs
        for offset in (0, 1, 4):
            for _ in kernels.orders(seed=offset):
                check_packing(kernels, weight, None, offset)
                check_packing(kernels, weight, (weight != 0) & (torch.rand(shape) < 0.8), offset)
                check_packing(kernels, weight, weight != 0, offset)


def test_a_mask_keeps_zeros_and_packing_sees_crowded_groups(kernels):
    weight = torch.zeros(32, 256, dtype=torch.bfloat16)
    mask = torch.zeros(32, 256, dtype=torch.bool)
    mask[:, 2::4] = mask[:, 3::4] = True
    check_packing(kernels, weight, mask, 0)
    pack, device = kernels.op("semi_structured_pack"), kernels.device
    for shape in ((32, 256), (33, 254)):
        weight = torch.zeros(shape, dtype=torch.float16)
        weight[-1, -6:-3] = 1.0 if shape[1] == 256 else 0.0
        weight[20, 100:103] = 1.0
        assert int(pack(weight.to(device), None)[2]) == 1
        assert int(pack(weight.to(device), torch.zeros(shape, dtype=torch.bool).to(device))[2]) == 0


PRODUCTS = [
    (1, 16, 128), (3, 33, 300), (8, 40, 1152), (9, 17, 2060), (16, 64, 40), (20, 70, 1300),
    (33, 130, 700), (64, 129, 520), (70, 40, 256), (130, 20, 64), (1, 300, 5), (2, 5, 0), (0, 5, 8),
    (3, 0, 8), (2, 16, 9000), (17, 16, 6000), (40, 16, 4000), (2, 2200, 136),
]  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_product_equals_the_reference_in_every_order(kernels, dtype):
    for seed, (M, N, K) in enumerate(PRODUCTS):
        x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
        weight = two_of_four(N, K, dtype)
        for _ in kernels.orders(seed):
            check_product(kernels, x, weight, bias, seed % 4, bool(seed % 2))


@pytest.mark.sanitized
def test_product_reads_nothing_but_its_operands(kernels):
    for M, N, K, offset in [(1, 1, 1, 0), (3, 17, 136, 0), (3, 17, 136, 3), (9, 40, 264, 0)]:
        x, weight = torch.randn(M, K).half(), two_of_four(N, K, torch.float16)
        for _ in kernels.orders(seed=M):
            check_product(kernels, x, weight, None, offset=offset)
    for M, K in [(20, 300), (40, 520)]:
        x, weight = torch.randn(M, K).bfloat16(), two_of_four(20, K, torch.bfloat16)
        check_product(kernels, x, weight, torch.randn(20).bfloat16(), 1, True)


def test_activations_and_layouts(kernels):
    x, weight = 3 * torch.randn(5, 200).half(), two_of_four(30, 200, torch.float16)
    for bias in (None, torch.randn(30).half()):
        for activation in range(4):
            for batch_last in (False, True):
                check_product(kernels, x, weight, bias, activation, batch_last)


def test_infinity_and_nan_reach_what_stores_their_column(kernels):
    weight = two_of_four(40, 300, torch.bfloat16)
    for column in (0, 77, 299):
        for value in ("nan", "inf"):
            x = torch.randn(3, 300).bfloat16()
            x[1, column] = float(value)
            check_product(kernels, x, weight, None)


def test_every_barrier_is_needed(kernels):
    torch.manual_seed(5)
    cases = [(3, 40, 2500), (20, 70, 1300)]
    made = [(torch.randn(M, K).half(), two_of_four(N, K, torch.float16)) for M, N, K in cases]

    def check():
        for x, weight in made:
            check_product(kernels, x, weight, None)

    kernels.assert_every_barrier_is_needed(check, "semi_structured_linear.cuh")


def test_launchers_refuse_what_they_cannot_take(kernels):
    device = kernels.device
    weight = two_of_four(20, 72, torch.float16)
    values, meta = (part.to(device) for part in layout.pack(weight, None)[:2])
    x = torch.zeros(3, 72, dtype=torch.float16, device=device)
    run = kernels.op("semi_structured_linear")
    with pytest.raises(RuntimeError, match="semi_structured_linear: x must be contiguous"):
        run(
            torch.zeros(72, 3, dtype=torch.float16, device=device).t(), values, meta, 20, None, 0, 0
        )
    with pytest.raises(
        RuntimeError, match=r"values must have shape \[2, 2, 4, 32, 8\], got \[2, 1"
    ):
        run(
            torch.zeros(3, 200, dtype=torch.float16, device=device),
            values,
            meta,
            20,
            None,
            0,
            False,
        )
    with pytest.raises(RuntimeError, match="values must be BFloat16, got Half"):
        run(x.bfloat16(), values, meta, 20, None, 0, False)
    with pytest.raises(RuntimeError, match="x must be BFloat16 or Half, got Float"):
        run(x.float(), values.float(), meta, 20, None, 0, False)
    with pytest.raises(RuntimeError, match="meta must be Int, got Long"):
        run(x, values, meta.long(), 20, None, 0, False)
    with pytest.raises(RuntimeError, match=r"bias must have shape \[20\], got \[19\]"):
        run(x, values, meta, 20, x[0, :19].contiguous(), 0, False)
    with pytest.raises(RuntimeError, match="activation must be 0 to 3, got 4"):
        run(x, values, meta, 20, None, 4, False)
    with pytest.raises(RuntimeError, match="values must begin on a 16-byte boundary"):
        run(x, misaligned(values.cpu(), 1, device), meta, 20, None, 0, False)
    with pytest.raises(RuntimeError, match="semi_structured_pack: weight must be BFloat16 or Half"):
        kernels.op("semi_structured_pack")(weight.float().to(device), None)
    with pytest.raises(RuntimeError, match=r"mask must have shape \[20, 72\], got \[20, 71\]"):
        mask = torch.zeros(20, 71, dtype=torch.bool, device=device)
        kernels.op("semi_structured_pack")(weight.to(device), mask)
    with pytest.raises(RuntimeError, match=r"meta must have shape \[2, 1, 32, 2\], got \[1, 1"):
        kernels.op("semi_structured_take")(weight.to(device), meta[:1])
    with pytest.raises(RuntimeError, match=r"semi_structured_to_dense: values must have shape"):
        kernels.op("semi_structured_to_dense")(values, meta, [20, 200])


@pytest.mark.gpu
def test_large_products_repeat_to_the_bit_and_run_in_a_cuda_graph(gpu):
    op = torch.ops.liveweight.semi_structured_linear
    for M, N, K in [(1, 4096, 4096), (8, 11008, 4096), (16, 4096, 14336), (40, 512, 16384)]:
        weight = two_of_four(N, K, torch.bfloat16, gpu)
        values, meta, _ = torch.ops.liveweight.semi_structured_pack(weight, None)
        x, bias = torch.randn(M, K, device=gpu).bfloat16(), torch.randn(N, device=gpu).bfloat16()
        first = op(x, values, meta, N, bias, 1, False)
        want = torch.relu(torch.nn.functional.linear(x.float(), weight.float(), bias.float()))
        torch.testing.assert_close(first.float(), want, rtol=2e-2, atol=0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = op(x, values, meta, N, bias, 1, False)
        graph.replay()
        assert torch.equal(again, first)
