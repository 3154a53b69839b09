"""block_linear beside the dense and the sparse ways that PyTorch offers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shapes import LINEAR

import liveweight as lw


def dense(x, weight, block):
    return lambda: F.linear(x, weight)


def dense_prepacked(x, weight, block):
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def torch_csr(x, weight, block):
    csr = weight.to_sparse_csr()
    return lambda: torch.mm(csr, x.t().contiguous()).t()


def torch_bsr(x, weight, block):
    bsr = weight.to_sparse_bsr(block)
    return lambda: torch.mm(bsr, x.t().contiguous()).t()


def liveweight(x, weight, block):
    packed = lw.formats.Block.from_dense(weight, block=block)
    return lambda: lw.ops.block_linear(x, packed)


CALLS = (dense, dense_prepacked, torch_csr, torch_bsr, liveweight)


def block_sparse(rows: int, columns: int, block: tuple[int, int], sparsity: float):
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(rows // block[0], columns // block[1], generator=generator) >= sparsity
    kept = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return torch.randn(rows, columns, generator=generator) * kept


@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("block", [(16, 1), (8, 8), (16, 16), (32, 32)], ids=str)
@pytest.mark.parametrize("layer", ["minilm.ffn", "square-1024", "square-4096"])
def test_block_linear(measure, layer, block, batch, sparsity, call):
    rows, columns = LINEAR[layer]
    weight, x = block_sparse(rows, columns, block, sparsity), torch.randn(batch, columns)
    name = f"{layer} block {block} batch {batch} sparsity {sparsity}"
    measure(name, call(x, weight, block), F.linear(x, weight))
