"""Linear layer with two of every four weights stored (2:4): y = act(x W^T + b)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from liveweight import _library, reference
from liveweight.formats.delta import is_filler
from liveweight.formats.semi_structured import TILE_COLUMNS, tiles_of
from liveweight.ops.activation import activation_grad
from liveweight.ops.semi_structured_torch import find_backend
from liveweight.ops.unstructured_linear import check_operands

_NAME = "semi_structured_linear"
_RELU = 1
HALVES = (torch.bfloat16, torch.float16)  # what the CUDA kernels compute in
FEW_TOKENS = 64  # of one pass of the CUDA kernel
# Without a library for many tokens: four passes read 4.5 bytes for each weight of W, W written out
# and multiplied by 5.1.
MOST_TOKENS = 256


def apply_semi_structured(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    shape: tuple[int, int],
    bias: Tensor | None,
    activation: int,
    batch_last: bool = False,
) -> Tensor:
    """Check the operands, flatten the batch and run; the parts of weight come unpacked.

    On a GPU, up to 64 tokens run the package's own kernel. More run PyTorch's semi-structured
    backend (semi_structured_torch) where it has one for the GPU, else further passes of the kernel
    or, from 257 on, a dense product. Other dtypes, and CPUs: plain PyTorch.
    """
    N, K = shape
    x = check_operands(_NAME, x, values, shape, bias)
    flat = (x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), K)).contiguous()
    args = (flat, values, meta, N, bias, activation, batch_last)
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = SemiStructuredLinear.apply(*args)
    else:
        y = run_forward(*args)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], N)


def run_forward(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    out_features: int,
    bias: Tensor | None,
    activation: int,
    batch_last: bool,
) -> Tensor:
    """Return act(x W^T + bias) [M, N] for x [M, K] contiguous by what suits device and tokens."""
    args = (x, values, meta, out_features, bias, activation, batch_last)
    if x.is_cuda and x.dtype not in HALVES:
        return reference.semi_structured_linear(*args)
    if not x.is_cuda or x.shape[0] <= FEW_TOKENS:
        return _op(*args)
    backend = find_backend(x.get_device())
    if backend is not None:
        return _op_torch(*args, backend)
    if x.shape[0] <= MOST_TOKENS:
        return _op(*args)
    weight = _op_dense(values, meta, (out_features, x.shape[1]))
    if batch_last:
        y = weight @ x.t() if bias is None else torch.addmm(bias.view(-1, 1), weight, x.t())
        return reference.apply_activation(y, activation).t()
    return reference.apply_activation(functional.linear(x, weight, bias), activation)


class SemiStructuredLinear(torch.autograd.Function):
    """grad_x = G W, grad_W[n, k] = sum_m G[m, n] x[m, k] where kept, G = grad act'(.).

    Both at the cost of a dense layer: W is written out, and the product is formed whole before its
    kept entries are taken; fillers get 0. ReLU's derivative is read from the output, GELU's from
    its input.
    """

    @staticmethod
    def forward(ctx, x, values, meta, out_features, bias, activation, batch_last):
        fused = activation if activation <= _RELU else 0
        y = run_forward(x, values, meta, out_features, bias, fused, batch_last)
        ctx.save_for_backward(x, values, meta, y if activation else None)
        ctx.activation = activation
        return y if fused == activation else reference.apply_activation(y, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, values, meta, before = ctx.saved_tensors
        if before is not None:
            grad = activation_grad(grad, before, ctx.activation)
        grad_x = grad_values = grad_bias = None
        compiled = not x.is_cuda or x.dtype in HALVES
        if ctx.needs_input_grad[0]:
            run = _op_dense if compiled else reference.semi_structured_to_dense
            grad_x = grad @ run(values, meta, (grad.shape[1], x.shape[1]))
        if ctx.needs_input_grad[1]:
            run = _op_take if compiled else reference.semi_structured_take
            grad_values = run(grad.t() @ x, meta).masked_fill_(is_filler(values), 0)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.sum(0)
        return grad_x, grad_values, None, None, grad_bias, None, None


def _fake(x, values, meta, out_features, bias, activation, batch_last):
    if batch_last:
        return x.new_empty(out_features, x.shape[0]).t()
    return x.new_empty(x.shape[0], out_features)


def _fake_torch(x, values, meta, out_features, bias, activation, batch_last, backend):
    return _fake(x, values, meta, out_features, bias, activation, batch_last)


def _fake_pack(weight, mask):
    R, U = tiles_of(tuple(weight.shape))
    meta = weight.new_empty(R, U, 32, 2, dtype=torch.int32)
    return weight.new_empty(R, U, 4, 32, 8), meta, weight.new_empty(1, dtype=torch.int32)


def _fake_to_dense(values, meta, shape):
    return values.new_empty(shape)


def _fake_take(dense, meta):
    R, U = meta.shape[:2]
    return dense.new_empty(R, U, TILE_COLUMNS // 32, 32, 8)


_library.register(_NAME, reference.semi_structured_linear, _fake)
_library.register(
    "semi_structured_torch_linear", reference.semi_structured_torch_linear, _fake_torch
)
_library.register("semi_structured_pack", reference.semi_structured_pack, _fake_pack)
_library.register("semi_structured_to_dense", reference.semi_structured_to_dense, _fake_to_dense)
_library.register("semi_structured_take", reference.semi_structured_take, _fake_take)
_op = torch.ops.liveweight.semi_structured_linear.default
_op_torch = torch.ops.liveweight.semi_structured_torch_linear.default
_op_dense = torch.ops.liveweight.semi_structured_to_dense.default
_op_take = torch.ops.liveweight.semi_structured_take.default
