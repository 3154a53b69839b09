"""nm_linear with SemiStructured: the numbers of the dense layer, gradients, compiled graphs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from liveweight import reference
from liveweight.formats import NM, SemiStructured
from liveweight.formats import semi_structured as layout
from liveweight.formats.delta import is_filler
from liveweight.ops import nm_linear

ACTIVATIONS = {None: lambda y: y, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": None}


def two_of_four(N: int, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    order = torch.rand(N, -(-K // 4), 4).argsort(-1)
    return (torch.randn(N, K) * (order < 2).flatten(1)[:, :K]).to(dtype)


def kept_of(dense: torch.Tensor, packed: SemiStructured) -> torch.Tensor:
    """Return a dense gradient's entries as values have them: 0 for fillers."""
    return layout.take(dense, packed.meta).masked_fill(is_filler(packed.values), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M,N,K", [(0, 3, 8), (1, 1, 4), (5, 33, 130), (17, 16, 128), (3, 7, 6)])
def test_forward(M, N, K, dtype):
    weight, bias = two_of_four(N, K, dtype), torch.randn(N).to(dtype)
    x = torch.randn(M, K).to(dtype)
    packed = SemiStructured.from_dense(weight)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}.get(dtype, 2e-3)
    for name in ACTIVATIONS:
        for batch_last in (False, True):
            got = nm_linear(x, packed, bias, activation=name, batch_last=batch_last)
            act = {"gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}.get(name)
            want = (act or ACTIVATIONS[name])(F.linear(x.double(), weight.double(), bias.double()))
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
            assert got.dtype == dtype and (got.t() if batch_last else got).is_contiguous()


def test_it_agrees_with_nm_on_batches_and_without_a_bias():
    weight, x = two_of_four(20, 64), torch.randn(2, 3, 64)
    got = nm_linear(x, SemiStructured.from_dense(weight))
    torch.testing.assert_close(got, nm_linear(x, NM.from_dense(weight)))
    assert got.shape == (2, 3, 20)
    moved = x.transpose(0, 1)
    torch.testing.assert_close(
        nm_linear(moved, SemiStructured.from_dense(weight)), got.transpose(0, 1)
    )


def test_infinity_meets_stored_entries_alone():
    weight = torch.zeros(2, 8)
    weight[0, 2], weight[0, 5], weight[1, 4], weight[1, 6] = 1.0, 2.0, 3.0, 4.0
    x = torch.zeros(1, 8)
    x[0, 7] = float("nan")
    y = nm_linear(x, SemiStructured.from_dense(weight))
    assert torch.equal(y, torch.zeros(1, 2))  # nothing is stored in column 7
    x[0, 7], x[0, 5] = 0.0, float("inf")
    assert torch.equal(
        nm_linear(x, SemiStructured.from_dense(weight)), torch.tensor([[float("inf"), 0.0]])
    )


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients_are_those_of_the_dense_layer(activation):
    N, K = 19, 70
    weight, x, bias = two_of_four(N, K).double(), torch.randn(6, K).double(), torch.randn(N)
    packed = SemiStructured.from_dense(weight)
    inputs = [t.requires_grad_() for t in (x, packed.values, bias.double())]
    got = nm_linear(inputs[0], packed, inputs[2], activation=activation)
    dense = [t.detach().clone().requires_grad_() for t in (x, weight, inputs[2])]
    y = F.linear(*dense)
    want = reference.apply_activation(
        y, {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}[activation]
    )
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(inputs[0].grad, dense[0].grad)
    torch.testing.assert_close(inputs[2].grad, dense[2].grad)
    torch.testing.assert_close(inputs[1].grad, kept_of(dense[1].grad, packed))


def test_gradcheck():
    packed = SemiStructured.from_dense(two_of_four(3, 9).double())
    inputs = [torch.randn(2, 9).double(), packed.values, torch.randn(3).double()]
    inside = ~is_filler(packed.values)  # fillers are no inputs
    numbers = packed.values[inside].clone()

    def run(x, numbers, bias):
        values = packed.values.masked_scatter(inside, numbers)
        weight = SemiStructured(values, packed.meta, packed.shape)
        return nm_linear(x, weight, bias, activation="gelu")

    inputs[1] = numbers
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


def test_pruned_weights_stay_pruned_while_training():
    weight = two_of_four(16, 64) * (torch.rand(16, 64) < 0.6)
    packed = SemiStructured.from_dense(weight)
    values = torch.nn.Parameter(packed.values.clone())
    trained = SemiStructured(values, packed.meta, packed.shape)
    kinds = (
        torch.optim.SGD([values], lr=0.1, momentum=0.9, weight_decay=0.01),
        torch.optim.AdamW([values], lr=0.1),
    )
    for optimizer in kinds:
        for _ in range(3):
            optimizer.zero_grad()
            nm_linear(torch.randn(8, 64), trained).square().sum().backward()
            optimizer.step()
    assert torch.equal(trained.to_dense() != 0, weight != 0)
    assert torch.equal(is_filler(values), is_filler(packed.values))
    assert not torch.equal(trained.to_dense(), weight)


def test_opcheck():
    ops, dtype = torch.ops.liveweight, torch.float32
    weight, x = two_of_four(20, 72, dtype), torch.randn(3, 72)
    packed = SemiStructured.from_dense(weight)
    parts = (packed.values, packed.meta)
    checks = ("test_schema", "test_faketensor")
    for batch_last in (False, True):
        args = (x, *parts, 20, torch.randn(20), 1, batch_last)
        torch.library.opcheck(ops.semi_structured_linear.default, args, test_utils=checks)
        torch.library.opcheck(
            ops.semi_structured_torch_linear.default, (*args, "cutlass"), test_utils=checks
        )
    for op, args in (
        (ops.semi_structured_pack.default, (weight, None)),
        (ops.semi_structured_pack.default, (weight, weight != 0)),
        (ops.semi_structured_to_dense.default, (*parts, [20, 72])),
        (ops.semi_structured_take.default, (weight, packed.meta)),
    ):
        torch.library.opcheck(op, args, test_utils=checks)


def test_compile_fullgraph():
    packed = SemiStructured.from_dense(two_of_four(20, 72))
    bias = torch.randn(20, requires_grad=True)

    def run(x, values, bias):
        weight = SemiStructured(values, packed.meta, packed.shape)
        return nm_linear(x, weight, bias, activation="relu")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    values = packed.values.clone().requires_grad_()
    for M in (3, 9):
        x = torch.randn(M, 72, requires_grad=True)
        got, want = compiled(x, values, bias), run(x, values, bias)
        torch.testing.assert_close(got, want)
        inputs = (x, values, bias)
        for a, b in zip(
            torch.autograd.grad(got.sum(), inputs),
            torch.autograd.grad(want.sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_messages():
    packed = SemiStructured.from_dense(two_of_four(20, 72))
    with pytest.raises(ValueError, match=r"semi_structured_linear: expected x \[..., 72\], got"):
        nm_linear(torch.ones(1, 71), packed)
    with pytest.raises(TypeError, match="expected x float32 like values, got float64"):
        nm_linear(torch.ones(1, 72).double(), packed)
    with pytest.raises(ValueError, match=r"expected bias \[20\], got \(19,\)"):
        nm_linear(torch.ones(1, 72), packed, torch.ones(19))
    with pytest.raises(ValueError, match="activation must be None, 'relu', 'gelu' or"):
        nm_linear(torch.ones(1, 72), packed, activation="tanh")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [1, 16, 64, 65, 200, 300])
def test_gpu_layer_and_gradients(gpu, M, dtype):
    weight = two_of_four(200, 328, dtype).to(gpu)
    x, bias = torch.randn(M, 328, device=gpu).to(dtype), torch.randn(200, device=gpu).to(dtype)
    packed = SemiStructured.from_dense(weight)
    inputs = [t.requires_grad_() for t in (x, packed.values, bias)]
    got = nm_linear(x, packed, bias, activation="relu")
    dense = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = F.relu(F.linear(*dense))
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=5e-2)
    got.sum().backward()
    want.sum().backward()
    for tensor, expected in zip(
        inputs, (dense[0].grad, kept_of(dense[1].grad, packed), dense[2].grad), strict=True
    ):
        scale = float(expected.abs().max())
        torch.testing.assert_close(tensor.grad.double(), expected, rtol=0, atol=0.03 * scale)


@pytest.mark.gpu
def test_gpu_packs_as_the_cpu_does(gpu):
    for shape in ((33, 300), (64, 256), (5, 7)):
        weight = two_of_four(*shape, torch.bfloat16)
        here, there = SemiStructured.from_dense(weight), SemiStructured.from_dense(weight.to(gpu))
        assert torch.equal(here.values, there.values.cpu())
        assert torch.equal(here.meta, there.meta.cpu())
        assert torch.equal(there.to_dense().cpu(), weight)
        turned = weight.t().contiguous().to(gpu).t()
        assert torch.equal(SemiStructured.from_dense(turned, turned != 0).values, there.values)
    with pytest.raises(ValueError, match="got 4 in row 0, columns 0 to 3"):
        SemiStructured.from_dense(torch.ones(4, 8, device=gpu, dtype=torch.float16))


@pytest.mark.gpu
def test_gpu_ops_keep_their_promises(gpu):
    ops, checks = torch.ops.liveweight, ("test_schema", "test_faketensor")
    weight = two_of_four(40, 200, torch.bfloat16).to(gpu)
    x, bias = torch.randn(3, 200, device=gpu).bfloat16(), torch.randn(40, device=gpu).bfloat16()
    packed = SemiStructured.from_dense(weight)
    parts = (packed.values, packed.meta)
    for op, args in (
        (ops.semi_structured_linear.default, (x, *parts, 40, bias, 1, False)),
        (ops.semi_structured_linear.default, (x, *parts, 40, None, 0, True)),
        (ops.semi_structured_pack.default, (weight, None)),
        (ops.semi_structured_to_dense.default, (*parts, [40, 200])),
        (ops.semi_structured_take.default, (weight, packed.meta)),
    ):
        torch.library.opcheck(op, args, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [3, 100, 300])
def test_gpu_layer_is_one_compiled_graph(gpu, M):
    packed = SemiStructured.from_dense(two_of_four(40, 200, torch.bfloat16).to(gpu))
    compiled = torch.compile(
        lambda x: nm_linear(x, packed, activation="gelu"), fullgraph=True, dynamic=False
    )
    x = torch.randn(M, 200, device=gpu).bfloat16()
    torch.testing.assert_close(
        compiled(x), nm_linear(x, packed, activation="gelu"), rtol=2e-2, atol=2e-2
    )
