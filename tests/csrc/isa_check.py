"""Compares every compiled CPU op with the PyTorch reference; run by test_isa.py, one process per
instruction set. Prints a JSON list [instruction set, ops checked, failures]."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import torch

from liveweight import _library, formats, ops, reference  # noqa: F401  (ops registers references)

# fp32 sums in another order: a few hundred terms of size one.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
HALF = {"rtol": 2**-7, "atol": 1e-4}  # bf16: sums in another order may round to a neighbour


def sparse(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * (torch.rand(shape) < 0.3)


def activity_stats() -> Iterator[tuple]:
    for shape in [(3, 5, 1), (700, 19, 1), (9, 1500, 1), (5, 3, 7), (4, 37, 16), (2, 35, 4700)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield ops.new_activity_stats(shape[1]), torch.randn(shape).to(dtype), 0.5


def mass_mask() -> Iterator[tuple]:
    for shape in [(1, 1), (5, 7), (9, 129), (3, 5000)]:
        for alpha in (0.0, 0.5, 0.95, 1.0):
            for authors_ties in (False, True):
                yield torch.randint(0, 40, shape).float(), alpha, authors_ties


def linears() -> Iterator[tuple]:
    for M, K, N in [(0, 5, 3), (1, 17, 9), (3, 63, 33), (19, 129, 40), (100, 300, 17)]:
        tile = (16, 300) if M % 2 else None
        weight = formats.Unstructured.from_dense(sparse(N, K), tile=tile)
        yield torch.randn(M, K), torch.randn(M, N), torch.randn(N), weight


def unstructured_linear() -> Iterator[tuple]:
    for x, _, bias, w in linears():
        index = (w.columns, w.segments, w.offsets, w.bits, w.tile)
        yield x, w.values, *index, w.shape[0], bias, 1, False
        yield x, w.values, *index, w.shape[0], None, 2, True
        halves = (t.bfloat16() for t in (x, w.values, bias))
        x, values, bias = halves
        yield x, values, *index, w.shape[0], bias, 1, False


def unstructured_linear_grad_x() -> Iterator[tuple]:
    for x, grad, _, w in linears():
        yield grad, w.values, w.columns, w.segments, w.offsets, w.tile, x.shape[1]


def unstructured_linear_grad_values() -> Iterator[tuple]:
    for x, grad, _, w in linears():
        yield grad, x, w.columns, w.segments, w.offsets, w.tile


def blocks() -> Iterator[tuple]:
    for M, K, N, block in [
        (0, 5, 3, (2, 2)),
        (1, 64, 48, (16, 16)),
        (2, 17, 9, (16, 1)),
        (3, 63, 33, (8, 8)),
        (19, 129, 70, (32, 32)),
        (21, 40, 23, (4, 2)),
        (40, 70, 65, (5, 3)),
        (13, 30, 24, (24, 7)),
    ]:
        weight = formats.Block.from_dense(sparse(N, K), torch.rand(N, K) < 0.02, block=block)
        yield torch.randn(M, K), torch.randn(M, N), torch.randn(N), weight


def block_linear() -> Iterator[tuple]:
    for x, _, bias, w in blocks():
        index = (w.values, w.row_offsets, w.columns, w.schedule, list(w.shape))
        yield x, *index, bias, 2, False
        yield x.t().contiguous().t(), *index, None, 0, True
        yield x.bfloat16(), w.values.bfloat16(), *index[1:], bias.bfloat16(), 1, False


def block_linear_grad_x() -> Iterator[tuple]:
    for _, grad, _, w in blocks():
        yield grad, w.values, w.row_offsets, w.columns, w.schedule, list(w.shape)


def block_linear_grad_values() -> Iterator[tuple]:
    for x, grad, _, w in blocks():
        yield grad, x, w.row_offsets, w.columns, w.schedule, list(w.block)


def convs() -> Iterator[tuple]:
    for B, C, size, Cout, k, stride, padding, dilation, groups in [
        (1, 3, 7, 5, 3, 1, 1, 1, 1),
        (2, 8, 12, 18, 3, 1, 1, 1, 2),
        (3, 4, 11, 6, 5, 2, 2, 1, 1),
        (2, 6, 9, 6, 3, 1, 2, 2, 3),
        (17, 5, 8, 7, 1, 1, 0, 1, 1),
        (1, 4, 33, 3, 3, 1, 1, 1, 1),
        (29, 4, 6, 5, 3, 1, 1, 1, 1),
        (18, 4, 7, 5, 3, 2, 1, 1, 1),
        (7, 5, 4, 6, 3, 1, 1, 1, 1),
        (3, 6, 8, 4, 3, 1, 1, 1, 2),
        (3, 4, 13, 6, 3, 2, 1, 1, 2),
        (1, 3, 41, 5, 3, 2, 0, 1, 1),
        (1, 4, 35, 3, 3, 1, 0, 1, 1),
    ]:
        x = torch.randn(B, C, size, size)
        kept = (torch.rand(Cout, C // groups) < 0.4)[:, :, None, None]
        weight = formats.Kernelwise.from_dense(torch.randn(Cout, C // groups, k, k) * kept)
        how = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
        out = (size + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        yield x, torch.randn(B, Cout, out, out), torch.randn(Cout), weight, how


def kernelwise_conv2d() -> Iterator[tuple]:
    for x, _, bias, w, how in convs():
        yield x, w.values, w.filter_offsets, w.channels, bias, *how, True, 1, 1
        yield x, w.values, w.filter_offsets, w.channels, None, *how, False, 2, 2
        x, values, bias = (t.bfloat16() for t in (x, w.values, bias))
        yield x, values, w.filter_offsets, w.channels, bias, *how, True, 1, 0


def kernelwise_conv2d_grad_x() -> Iterator[tuple]:
    for x, grad, _, w, how in convs():
        yield grad, w.values, w.filter_offsets, w.channels, list(x.shape), *how


def kernelwise_conv2d_grad_values() -> Iterator[tuple]:
    for x, grad, _, w, how in convs():
        yield grad, x, w.filter_offsets, w.channels, list(w.values.shape[1:]), *how


def sparse_convs() -> Iterator[tuple]:
    for x, grad, bias, w, how in convs():
        weight = formats.UnstructuredKernels.from_dense(sparse(*w.shape))
        index = (weight.columns, weight.segments, weight.offsets)
        yield x, grad, bias, weight.values, (*index, list(weight.shape), list(weight.tile)), how


def unstructured_conv2d() -> Iterator[tuple]:
    for x, _, bias, values, index, how in sparse_convs():
        yield x, values, *index, bias, *how, True, 1, 0
        yield x, values, *index, None, *how, False, 2, 1
        yield (
            x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
            values,
            *index,
            bias,
            *how,
            True,
            1,
            2,
        )


def unstructured_conv2d_grad_x() -> Iterator[tuple]:
    for x, grad, _, values, index, how in sparse_convs():
        yield grad, values, *index, list(x.shape), *how


def unstructured_conv2d_grad_values() -> Iterator[tuple]:
    for x, grad, _, _, index, how in sparse_convs():
        yield grad, x, *index, *how


def masked_linear() -> Iterator[tuple]:
    for M, K, N in [(1, 17, 9), (3, 64, 33), (19, 129, 40)]:
        bits = torch.randint(-(2**31), 2**31, (N, -(-K // 32)), dtype=torch.int64).int()
        if K % 32:
            bits[:, -1] &= (1 << K % 32) - 1
        yield torch.randn(M, K), torch.randn(N, K), bits, torch.randn(N)


def masked_linear_grad_x() -> Iterator[tuple]:
    for x, weight, bits, _ in masked_linear():
        yield torch.randn(x.shape[0], weight.shape[0]), weight, bits


def masked_linear_grad_weight() -> Iterator[tuple]:
    for x, weight, bits, _ in masked_linear():
        yield torch.randn(x.shape[0], weight.shape[0]), x, bits


CASES: dict[str, Callable[[], Iterator[tuple]]] = {
    "activity_stats_": activity_stats,
    "mass_mask": mass_mask,
    "unstructured_linear": unstructured_linear,
    "unstructured_linear_grad_x": unstructured_linear_grad_x,
    "unstructured_linear_grad_values": unstructured_linear_grad_values,
    "block_linear": block_linear,
    "block_linear_grad_x": block_linear_grad_x,
    "block_linear_grad_values": block_linear_grad_values,
    "kernelwise_conv2d": kernelwise_conv2d,
    "kernelwise_conv2d_grad_x": kernelwise_conv2d_grad_x,
    "kernelwise_conv2d_grad_values": kernelwise_conv2d_grad_values,
    "unstructured_conv2d": unstructured_conv2d,
    "unstructured_conv2d_grad_x": unstructured_conv2d_grad_x,
    "unstructured_conv2d_grad_values": unstructured_conv2d_grad_values,
    "masked_linear": masked_linear,
    "masked_linear_grad_x": masked_linear_grad_x,
    "masked_linear_grad_weight": masked_linear_grad_weight,
}


def difference(name: str, args: tuple) -> str:
    """Return "" when the compiled op and the reference agree, else how they differ."""
    copy = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    got = getattr(torch.ops.liveweight, name)(*args)
    wanted = getattr(reference, name)(*copy)
    if name.endswith("_"):
        got, wanted = args[0], copy[0]
    try:
        torch.testing.assert_close(got, wanted, **(HALF if got.dtype is torch.bfloat16 else CLOSE))
    except AssertionError as error:
        shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
        return f"{name}{shapes}: {error}"
    return ""


def main() -> None:
    torch.manual_seed(0)
    served = _library.backends()
    names = [name for name in _library.SCHEMAS if served[name]["cpu"] != "reference"]
    failures = [f"{name}: no case in isa_check.py" for name in names if name not in CASES]
    for name in names:
        failures += filter(None, (difference(name, args) for args in CASES.get(name, tuple)()))
    print(json.dumps([_library.cpu_isa(), names, failures]))


if __name__ == "__main__":
    main()
