"""delta_linear and its kin in CUDA C++: their values, on the emulator and on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from liveweight import reference
from liveweight.formats import Delta
from liveweight.formats.delta import is_filler

TYPES = [torch.bfloat16, torch.float16]


@dataclasses.dataclass(frozen=True)
class Case:
    """One weight [N, K] and the way it is packed."""

    N: int
    K: int
    density: float
    bits: int | None = None
    lanes: int | None = None
    part: int | None = None
    head: int | None = None
    tokens: int = 1

    def weight(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, Delta]:
        generator = torch.Generator().manual_seed(self.N * 31 + self.K)
        size = (self.N, self.K)
        kept = torch.rand(size, generator=generator) < self.density
        dense = (torch.randn(size, generator=generator) * kept).to(dtype).to(device)
        layout = {"bits": self.bits, "lanes": self.lanes, "part": self.part, "head": self.head}
        return dense, Delta.from_dense(dense, tokens=self.tokens, **layout)


def index_of(packed: Delta) -> tuple:
    index = (packed.deltas, packed.starts, packed.order, packed.offsets)
    return *index, packed.shape, packed.layout


def make_x(M: int, K: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(M * 7 + K)
    return torch.randn(M, K, generator=generator).to(dtype).to(device)


def expected(x, dense, bias=None, activation: int = 0) -> torch.Tensor:
    """Return act(x W^T + bias) in float64, from the kept weights alone."""
    kept = dense != 0
    # where(): a removed weight lets no NaN through.
    terms = torch.where(kept, x.double()[:, None] * dense.double(), 0.0).sum(-1)
    return reference.apply_activation(terms + (0 if bias is None else bias.double()), activation)


def assert_close(got, want, message: str = "", roundings: int = 1) -> None:
    rtol = roundings * (2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-10)
    torch.testing.assert_close(
        got.double(), want, rtol=rtol, atol=2e-3, equal_nan=True, msg=lambda m: f"{message}: {m}"
    )


RAGGED = [
    Case(1, 1, 1.0),
    Case(5, 7, 0.5),
    Case(9, 33, 0.0),
    Case(3, 40, 1.0, lanes=4),
    Case(70, 300, 0.1),
    Case(33, 520, 0.25, bits=4, lanes=8),
    Case(17, 1000, 0.02, bits=6, lanes=2),
    Case(40, 3000, 0.004, bits=8, lanes=32),
    Case(12, 900, 0.01, bits=4, lanes=1),
    Case(20, 200, 0.3, bits=5, lanes=16, part=64),
    Case(290, 130, 0.2, bits=5, lanes=32),
    Case(33, 700, 0.1, bits=5, lanes=2, head=4),
    Case(21, 500, 0.2, bits=4, lanes=1, head=4),
    Case(70, 96, 0.1, bits=8, lanes=1, head=4),
    Case(7, 1300, 0.1, bits=6, lanes=8, part=640, head=4),
    Case(33, 700, 0.1, bits=5, lanes=8, tokens=8),
    Case(5, 301, 0.3, bits=4, lanes=32, tokens=8),
    Case(70, 1301, 0.2, bits=8, lanes=16, part=648, head=4, tokens=4),
]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 8, 9])
def test_delta_linear_equals_the_reference_in_every_order(kernels, M, dtype):
    for seed, case in enumerate(RAGGED):
        dense, packed = case.weight(dtype, kernels.device)
        x = make_x(M, case.K, dtype, kernels.device)
        want = expected(x, dense)
        for order in kernels.orders(seed):
            got = kernels.op("delta_linear")(x, packed.values, *index_of(packed), None, 0)
            assert_close(got, want, f"{case}, {order}")


@pytest.mark.parametrize("case", [RAGGED[4], RAGGED[9]], ids=["one part", "parts"])
def test_bias_and_activations(kernels, case):
    dense, packed = case.weight(torch.bfloat16, kernels.device)
    bias = make_x(1, case.N, torch.bfloat16, kernels.device)[0]
    for M in (1, 4, 70):  # 70 samples of so dense a weight are multiplied densely
        x = make_x(M, case.K, torch.bfloat16, kernels.device)
        for activation in range(4):
            call = kernels.op("delta_linear")
            got = call(x, packed.values, *index_of(packed), bias, activation)
            want = expected(x, dense, bias, activation)
            # A dense product is rounded before its activation.
            assert_close(got, want, f"{M}, {activation}", roundings=2 if M == 70 else 1)


def test_many_samples_take_passes_of_a_very_sparse_weight(kernels):
    case = Case(40, 3000, 0.004)
    dense, packed = case.weight(torch.float16, kernels.device)
    x = make_x(61, case.K, torch.float16, kernels.device)
    x[3] = float("inf")  # a dense product would give NaN wherever it meets a removed weight
    got = kernels.op("delta_linear")(x, packed.values, *index_of(packed), None, 0)
    assert_close(got, expected(x, dense))
    assert not got[:3].isnan().any() and not got[4:].isnan().any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_fillers_stop_nan_and_inf(kernels, dtype, poison):
    case = Case(24, 700, 0.02, bits=4, lanes=4)
    dense, packed = case.weight(dtype, kernels.device)
    assert int(is_filler(packed.values).sum()) > 200
    row, column, at = packed_fillers(packed)
    removed = dense[row, column] == 0
    assert int(removed.sum()) > 100
    for M in (1, 2, 4, 8):
        for place in column[removed][::40].tolist():
            x = make_x(M, case.K, dtype, kernels.device)
            x[M // 2, place] = poison
            got = kernels.op("delta_linear")(x, packed.values, *index_of(packed), None, 0)
            assert_close(got, expected(x, dense), f"column {place}")
            assert bool(got[:, dense[:, place] == 0].isfinite().all())


def packed_fillers(packed: Delta):
    """Return row, column and index of the fillers that stand in streams of rows."""
    from liveweight.formats import delta_layout

    layout = delta_layout.Layout(*packed.shape, *packed.layout)
    row, column = delta_layout.unpack(*index_of(packed)[:4], layout)
    at = (is_filler(packed.values) & (row >= 0)).nonzero()[:, 0]
    return row[at], column[at], at


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_products_are_left_out_for_minus_zero_alone(kernels, tokens):
    inf, nan = float("inf"), float("nan")
    value = torch.tensor([-0.0, 0.0, 1.5, -1e-45, inf, nan, -0.0, -2.0])
    x = torch.randn(8, tokens)
    x[0], x[1], x[6, 0] = nan, inf, -inf
    sums = torch.randn(8, tokens)
    want = torch.where(
        is_filler(value)[:, None], sums, torch.addcmul(sums.double(), value[:, None], x).float()
    )
    got = sums.to(kernels.device)
    kernels.probe("products")(value.to(kernels.device), x.to(kernels.device), got)
    torch.testing.assert_close(got.cpu(), want, equal_nan=True)
    assert torch.equal(got.cpu()[is_filler(value)], sums[is_filler(value)])


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_kept_zeros_pass_nan_on(kernels, bits):
    weight = torch.zeros(3, 50, dtype=torch.bfloat16)
    mask = torch.zeros(3, 50, dtype=torch.bool)
    mask[1, 20], mask[2, 5] = True, True
    packed = Delta.from_dense(weight.to(kernels.device), mask.to(kernels.device), bits=bits)
    x = torch.zeros(1, 50, dtype=torch.bfloat16, device=kernels.device)
    x[0, 20] = float("nan")
    got = kernels.op("delta_linear")(x, packed.values, *index_of(packed), None, 0)
    assert got.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_expanding_and_gradients_of_values(kernels, dtype):
    for seed, case in enumerate(RAGGED):
        dense, packed = case.weight(dtype, kernels.device)
        inputs = [make_x(40, size, dtype, kernels.device) for size in (case.N, case.K)]
        want = reference.delta_linear_grad_values(*inputs, packed.values, *index_of(packed))
        for order in kernels.orders(seed):
            got = kernels.op("delta_to_dense")(packed.values, *index_of(packed))
            assert torch.equal(got, dense), f"{case}, {order}"
            call = kernels.op("delta_linear_grad_values")
            got = call(*inputs, packed.values, *index_of(packed))
            assert_close(got, want.double(), f"{case}, {order}")
            filler = is_filler(packed.values)
            assert not got[filler].any() and not torch.signbit(got[filler]).any()


@pytest.mark.sanitized
@pytest.mark.parametrize("M", [1, 3, 8])
def test_nothing_outside_the_tensors_is_read(kernels, M):
    for case in [
        RAGGED[0],
        RAGGED[1],
        RAGGED[4],
        RAGGED[5],
        RAGGED[6],
        RAGGED[9],
        RAGGED[-1],
        RAGGED[-2],
    ]:
        dense, packed = case.weight(torch.bfloat16, kernels.device)
        for offset in (0, 1):
            # x begins `offset` elements behind a boundary and ends with its storage.
            storage = torch.empty(M * case.K + offset, dtype=torch.bfloat16, device=kernels.device)
            x = storage[offset:].view(M, case.K)
            x.copy_(make_x(M, case.K, torch.bfloat16, kernels.device))
            got = kernels.op("delta_linear")(x, packed.values, *index_of(packed), None, 0)
            assert_close(got, expected(x, dense), str(case))
        assert torch.equal(kernels.op("delta_to_dense")(packed.values, *index_of(packed)), dense)


def test_every_barrier_is_needed(kernels):
    cases = [Case(70, 300, 0.1, bits=4, lanes=8), Case(20, 200, 0.3, lanes=16, part=64)]
    cases.append(Case(40, 2000, 0.02, bits=4, lanes=1))  # more rows than shared memory expands
    made = []
    for case in cases:
        dense, packed = case.weight(torch.bfloat16, kernels.device)
        x = make_x(2, case.K, torch.bfloat16, kernels.device)
        poisoned = x.clone()
        column = packed_fillers(packed)[1]
        poisoned[1, int(column[column > case.K // 2][0])] = float("nan")
        made.append((dense, packed, [(v, expected(v, dense)) for v in (x, poisoned)]))

    def check():
        for dense, packed, inputs in made:
            for x, want in inputs:
                got = kernels.op("delta_linear")(x, packed.values, *index_of(packed), None, 0)
                assert_close(got, want)
            assert torch.equal(
                kernels.op("delta_to_dense")(packed.values, *index_of(packed)), dense
            )

    kernels.assert_every_barrier_is_needed(check, "delta_linear.cuh", "delta_dense.cuh")


@pytest.mark.parametrize("M,N,K", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
def test_empty_sides(kernels, M, N, K):
    dense, packed = Case(N, K, 0.5).weight(torch.float16, kernels.device)
    bias = make_x(1, N, torch.float16, kernels.device)[0]
    x = make_x(M, K, torch.float16, kernels.device)
    got = kernels.op("delta_linear")(x, packed.values, *index_of(packed), bias, 0)
    assert got.shape == (M, N)
    assert_close(got, expected(x, dense, bias))
    assert torch.equal(kernels.op("delta_to_dense")(packed.values, *index_of(packed)), dense)


def test_launcher_refuses_what_it_cannot_take(kernels):
    call = kernels.op("delta_linear")
    dense, packed = Case(6, 40, 0.3).weight(torch.bfloat16, kernels.device)
    x = make_x(2, 40, torch.bfloat16, kernels.device)
    index, values = index_of(packed), packed.values

    def refused(message: str, x=x, values=values, index=index, bias=None, activation=0):
        with pytest.raises(RuntimeError, match=message):
            call(x, values, *index, bias, activation)

    refused("x must be BFloat16, got Half", x=x.half())
    refused(r"x must have shape \[\*, 40\], got \[2, 39\]", x=x[:, :39].contiguous())
    refused("x must be contiguous", x=x.t().contiguous().t())
    refused("x must be BFloat16 or Half, got Float", x=x.float(), values=values.float())
    refused(r"bias must have shape \[6\], got \[5\]", bias=x[0, :5].contiguous())
    refused("activation must be 0, 1, 2 or 3, got 4", activation=4)
    refused("bits must be 4, 5, 6 or 8, got 7", index=(*index[:5], (7, 1, 40, 0, 1)))
    refused("lanes must be a power of two up to 32, got 3", index=(*index[:5], (4, 3, 40, 0, 1)))
    refused(
        "part must be a multiple of 8 from 8 to 32768, got 12", index=(*index[:5], (4, 1, 12, 0, 1))
    )
    refused("head must be 0 or 4, got 1", index=(*index[:5], (4, 1, 40, 1, 1)))
    refused("classes must be 1, or 8", index=(*index[:5], (4, 4, 40, 0, 8)))
    refused("starts must be Short, got Int", index=(index[0], index[1].int(), *index[2:]))
    refused("order must have shape", index=(*index[:2], index[2][:, :1].contiguous(), *index[3:]))
    moved = torch.cat((values[:1], values))[1:]
    refused("values must begin on a 16-byte boundary", values=moved)


@pytest.mark.gpu
def test_repeats_to_the_bit_and_runs_in_a_cuda_graph(gpu):
    dense, packed = Case(4096, 4096, 0.1).weight(torch.bfloat16, gpu)
    x = make_x(4, 4096, torch.bfloat16, gpu)
    call = torch.ops.liveweight.delta_linear
    first = call(x, packed.values, *index_of(packed), None, 0)
    torch.testing.assert_close(first.float(), x.float() @ dense.float().T, rtol=1e-2, atol=0.3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x, packed.values, *index_of(packed), None, 0)
    graph.replay()
    assert torch.equal(out, first)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 8, 16, 100])
@pytest.mark.parametrize("N,K", [(14336, 4096), (4096, 14336), (300, 70000)])
def test_large(gpu, M, N, K):
    dense, packed = Case(N, K, 0.1).weight(torch.bfloat16, gpu)
    x = make_x(M, K, torch.bfloat16, gpu)
    got = torch.ops.liveweight.delta_linear(x, packed.values, *index_of(packed), None, 0)
    want = x.double() @ dense.double().T
    torch.testing.assert_close(got.double(), want, rtol=2.0**-7, atol=1e-3 * K**0.5)
