"""unstructured_linear beside the dense and the sparse ways that PyTorch and SciPy offer."""

from __future__ import annotations

import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from shapes import LINEAR, pruned_linear

import liveweight as lw


def dense(x, weight):
    return lambda: F.linear(x, weight)


def dense_prepacked(x, weight):
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def torch_csr(x, weight):
    csr = weight.to_sparse_csr()
    return lambda: torch.mm(csr, x.t().contiguous()).t()


def scipy_csr(x, weight):
    csr = scipy.sparse.csr_matrix(weight.numpy())
    return lambda: torch.from_numpy(csr @ x.t().contiguous().numpy()).t()


def liveweight(x, weight):
    packed = lw.formats.Unstructured.from_dense(weight)
    return lambda: lw.ops.unstructured_linear(x, packed)


CALLS = (dense, dense_prepacked, torch_csr, scipy_csr, liveweight)


@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("layer", LINEAR)
def test_unstructured_linear(measure, layer, batch, sparsity, call):
    rows, columns = LINEAR[layer]
    weight, x = pruned_linear(rows, columns, sparsity), torch.randn(batch, columns)
    measure(f"{layer} batch {batch} sparsity {sparsity}", call(x, weight), F.linear(x, weight))
