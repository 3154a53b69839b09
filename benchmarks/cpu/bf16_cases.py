"""Linear layers in bfloat16, beside dense bf16, which uses AMX where the CPU has it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from shapes import pruned_linear
from torch import Tensor

import liveweight as lw
from cpu.linear_cases import SQUARE, TALL, pruned_blocks
from cpu.timing import OURS, Cell, Settings, measure

KINDS = {"F.linear": "torch", "oneDNN packed": "dense", "fp32": "note"}
TOLERANCE = 1e-2  # relative: one rounding to 8 bits, of operands that are the same for all calls


def linear_bf16(settings: Settings) -> Iterator[dict]:
    """Unstructured weights and blocks of 16 x 16 in bf16, warm: shapes x sparsities x batches."""
    for shape in settings.pick((SQUARE, TALL), (TALL,)):
        for kind in ("single weights", "16x16"):
            for sparsity in settings.pick((0.5, 0.9, 0.95), (0.9,)):
                weight = _weight(shape, kind, sparsity)
                for batch in settings.pick((1, 8, 32, 128), (1, 32)):
                    yield measure(_cell(weight, kind, sparsity, batch), settings)


def _weight(shape: tuple[int, int], kind: str, sparsity: float) -> Tensor:
    if kind == "16x16":
        return pruned_blocks(shape, (16, 16), sparsity).bfloat16()
    return pruned_linear(*shape, sparsity).bfloat16()


def _ours(weight: Tensor, kind: str):
    if kind == "16x16":
        blocks = lw.formats.Block.from_dense(weight, block=(16, 16))
        return lambda x: lw.ops.block_linear(x, blocks)
    packed = lw.formats.Unstructured.from_dense(weight)
    return lambda x: lw.ops.unstructured_linear(x, packed)


def _cell(weight: Tensor, kind: str, sparsity: float, batch: int) -> Cell:
    x = torch.randn(batch, weight.shape[1]).bfloat16()
    wide, narrow, wide_x = _ours(weight.float(), kind), _ours(weight, kind), x.float()
    calls = {
        OURS: lambda: narrow(x),
        "F.linear": lambda: F.linear(x, weight),
        "fp32": lambda: wide(wide_x),
    }
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
        pointwise = torch.ops.mkldnn._linear_pointwise
        calls["oneDNN packed"] = lambda: pointwise(x, packed, None, "none", [], "")
    labels = {"block": kind, "shape": "x".join(map(str, weight.shape)), "batch": batch}
    kept = int((weight != 0).sum())
    return Cell(
        {**labels, "sparsity": sparsity}, calls, KINDS, 2.0 * kept * batch,
        truth=lambda: x.double() @ weight.double().t(), tolerance=TOLERANCE,
    )  # fmt: skip
