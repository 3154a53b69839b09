"""What our ops are compared with: dense and sparse calls of PyTorch and SciPy, one layer each."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], object]

LINEAR_KINDS = {
    "F.linear": "torch",
    "oneDNN packed": "dense",
    "MKL packed": "dense",
    "torch.compile": "dense",
    "torch.mm(csr)": "sparse",
    "scipy csr": "sparse",
    "torch bsr": "sparse",
    "F.linear(x, csr)": "sparse",
}
CONV_KINDS = {
    "F.conv2d": "torch",
    "channels_last": "dense",
    "oneDNN packed": "dense",
    "oneDNN packed, channels_last": "dense",
    "torch.compile": "dense",
    "im2col + csr": "sparse",
}
# Multiply-adds beyond which one call of a sparse baseline would take about a second.
SPARSE_LIMIT = 4e8
NAIVE_LIMIT = 1.2e8


def dense_linear(x: Tensor, weight: Tensor) -> dict[str, Call]:
    """Return the dense calls: as written, and with the weight packed before."""
    batch = x.shape[0]
    calls: dict[str, Call] = {"F.linear": lambda: F.linear(x, weight)}
    if torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
        pointwise = torch.ops.mkldnn._linear_pointwise
        calls["oneDNN packed"] = lambda: pointwise(x, onednn, None, "none", [], "")
    if torch.backends.mkl.is_available():
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, batch)
        linear = torch.ops.mkl._mkl_linear
        calls["MKL packed"] = lambda: linear(x, mkl, weight, None, batch)
    return calls


def sparse_linear(x: Tensor, weight: Tensor, csr: Tensor, scipy_csr: object) -> dict[str, Call]:
    """Return the sparse calls that finish within about a second each."""
    work = csr.values().numel() * x.shape[0]
    calls: dict[str, Call] = {}
    if work <= SPARSE_LIMIT:
        calls["torch.mm(csr)"] = lambda: torch.mm(csr, x.t().contiguous()).t()
        if scipy_csr is not None:
            array = x.numpy()
            calls["scipy csr"] = lambda: torch.from_numpy((scipy_csr @ array.T.copy()).T)
    if work <= NAIVE_LIMIT:
        calls["F.linear(x, csr)"] = lambda: _naive(x, csr)
    return calls


def _naive(x: Tensor, csr: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # CSR fails under inference_mode
        return F.linear(x, csr)


def to_csr(weight: Tensor) -> tuple[Tensor, object]:
    """Return the weight as torch's CSR and as SciPy's (None where SciPy is missing)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "sparse CSR support is in beta"
        csr = weight.to_sparse_csr()
    try:
        import scipy.sparse
    except ImportError:
        return csr, None
    return csr, scipy.sparse.csr_matrix(weight.numpy())


def bsr_linear(x: Tensor, weight: Tensor, block: tuple[int, int]) -> dict[str, Call]:
    """Return torch's product with a block-sparse weight; MKL behind it takes square blocks only."""
    if block[0] != block[1] or int((weight != 0).sum()) * x.shape[0] > SPARSE_LIMIT:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bsr = weight.to_sparse_bsr(block)
    return {"torch bsr": lambda: torch.mm(bsr, x.t().contiguous()).t()}


def dense_conv(x: Tensor, weight: Tensor, stride: int, padding: int) -> dict[str, Call]:
    """Return the dense calls: both memory formats, each also with the weight packed before."""
    last = torch.channels_last
    calls: dict[str, Call] = {}
    for label, form in (("F.conv2d", torch.contiguous_format), ("channels_last", last)):
        xs, ws = x.contiguous(memory_format=form), weight.contiguous(memory_format=form)
        calls[label] = lambda xs=xs, ws=ws: F.conv2d(xs, ws, None, stride, padding)
    if not torch.backends.mkldnn.is_available():
        return calls
    sizes = ([padding] * 2, [stride] * 2, [1, 1], 1)
    for label, form in (("", torch.contiguous_format), (", channels_last", last)):
        xs, ws = x.contiguous(memory_format=form), weight.contiguous(memory_format=form)
        packed = torch.ops.mkldnn._reorder_convolution_weight(ws, *sizes, list(xs.shape))
        calls[f"oneDNN packed{label}"] = lambda xs=xs, p=packed: (
            torch.ops.mkldnn._convolution_pointwise(xs, p, None, *sizes, "none", [], "")
        )
    return calls


def im2col(x: Tensor, weight: Tensor, stride: int, padding: int) -> dict[str, Call]:
    """Return convolution as a product of a CSR weight and the unfolded input."""
    csr, _ = to_csr(weight.flatten(1))
    kernel = weight.shape[2]
    side = (x.shape[2] + 2 * padding - kernel) // stride + 1
    if csr.values().numel() * side**2 * x.shape[0] > SPARSE_LIMIT:
        return {}

    def call():
        columns = F.unfold(x, (kernel, kernel), padding=padding, stride=stride)  # [B, K, P]
        product = torch.mm(csr, columns.transpose(0, 1).flatten(1))
        return product.view(weight.shape[0], len(x), side, side).transpose(0, 1)

    return {"im2col + csr": call}


def freeze(model: Callable) -> Callable:
    """Return torch.compile of a model with its weights frozen (needs a C++ compiler)."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    return torch.compile(model)


class Layer(torch.nn.Module):
    """A dense layer as a module, so that torch.compile can freeze its weight."""

    def __init__(self, weight: Tensor, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return F.linear(x, self.weight)
        return F.conv2d(x, self.weight, None, self.stride, self.padding)


def compiled(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> dict[str, Call]:
    """Return the compiled dense layer; empty where nothing can be compiled here."""
    torch._dynamo.reset()
    layer = freeze(Layer(weight, stride, padding).eval())
    try:
        with torch.inference_mode():
            layer(x)
    except Exception as error:  # no compiler, or one that inductor cannot use
        print(f"torch.compile does not work here: {type(error).__name__}")
        return {}
    return {"torch.compile": lambda: layer(x)}
