"""Linear layer whose weight lacks whole blocks: y = act(x W^T + b)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liveweight import _library, reference
from liveweight._check import cast_like, check_bias
from liveweight.formats import Block
from liveweight.formats.block import blocks_to_dense, cut_blocks
from liveweight.formats.pattern import expand_rows
from liveweight.ops.activation import activation_code, activation_grad

_NAME = "block_linear"
_RELU = activation_code("relu")
_FORWARD_DTYPES = (torch.float32, torch.bfloat16)  # of the CPU kernel of the forward pass
_HALVES = (torch.bfloat16, torch.float16)


def block_linear(
    x: Tensor,
    weight: Block,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    batch_last: bool = False,
) -> Tensor:
    """Apply a linear layer whose weight is a list of blocks: y = act(x W^T + b).

    x           [..., K] float32 or bfloat16 and, on a GPU, float16, added up in fp32 (other dtypes,
                and devices without a kernel: plain PyTorch); on a CPU a matrix whose transpose is
                contiguous is read where it lies, on a GPU it is copied unless blocks are narrow
    weight      [N, K], values like x
    bias        [N] like x, or None
    activation  None, "relu", "gelu" or "gelu_tanh"
    batch_last  for x [M, K]: return y [M, N] with y.t() contiguous
    returns     [..., N] like x

    Differentiable once, in x, the values and the bias. Zeros inside kept blocks are multiplied. The
    index values of weight are not checked here: Block.from_dense and Block.validate vouch for them.
    On a GPU blocks with sides of 16, 32, 64 or 128 have a kernel; others run in plain PyTorch, with
    one warning. Blocks of 16 rows use the least of its tensor cores: the same mask stored in blocks
    of 32 or 64 rows can be faster there, although it stores more zeros. Narrow blocks of so many
    rows and 1, 2, 4 or 8 columns have one too, which turns x first unless its transpose lies
    contiguous; V:N:M masks are such blocks. Their gradients run at dense cost.
    Raises ValueError (shapes, names, devices) and TypeError (types, dtypes).
    """
    if not isinstance(weight, Block):
        raise TypeError(f"{_NAME}: weight must be formats.Block, got {type(weight).__name__}")
    parts = (weight.values, weight.row_offsets, weight.columns, weight.schedule, weight.shape)
    return apply_block(x, *parts, bias, activation_code(activation), batch_last)


def apply_block(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    schedule: Tensor,
    shape: tuple[int, int],
    bias: Tensor | None,
    activation: int,
    batch_last: bool = False,
) -> Tensor:
    """Check the operands, flatten the batch and run the op; the parts of weight come unpacked."""
    x = _check(x, values, shape, bias, batch_last)
    flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), shape[1])
    if not (flat.is_contiguous() or flat.t().is_contiguous()):
        flat = flat.contiguous()
    args = (flat, values, row_offsets, columns, schedule, shape, bias, activation, batch_last)
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = _BlockLinear.apply(*args)
    else:
        y = _forward(*args)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _check(
    x: Tensor, values: Tensor, shape: tuple[int, int], bias: Tensor | None, batch_last: bool
) -> Tensor:
    """Return x, cast under autocast as nn.Linear does; raise where operands do not fit."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{_NAME}: x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.size(-1) != shape[1]:
        raise ValueError(f"{_NAME}: expected x [..., {shape[1]}], got {tuple(x.shape)}")
    if batch_last and x.dim() != 2:
        raise ValueError(f"{_NAME}: batch_last needs x [M, {shape[1]}], got {tuple(x.shape)}")
    if x.device != values.device:
        raise ValueError(f"{_NAME}: x is on {x.device}, expected {values.device} like values")
    if x.dtype is not values.dtype:
        x = cast_like(_NAME, x, values)
    if bias is not None:
        check_bias(_NAME, bias, shape[0], values)
    return x


def _select(op, plain, x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)):
    """Return the op, or its reference where the op's CPU kernel does not know the dtype."""
    return plain if x.is_cpu and x.dtype not in dtypes else op


def _widen(tensor: Tensor) -> Tensor:
    """Return a half-precision CPU tensor as float32, which the kernels of gradients add in."""
    return tensor.float() if tensor.is_cpu and tensor.dtype in _HALVES else tensor


def _forward(x, *rest) -> Tensor:
    return _select(_op, reference.block_linear, x, _FORWARD_DTYPES)(x, *rest)


class _BlockLinear(torch.autograd.Function):
    """grad_x = G W, grad_W[n, k] = sum_m G[m, n] x[m, k] in kept blocks, G = grad * act'."""

    @staticmethod
    def forward(ctx, x, values, row_offsets, columns, schedule, shape, bias, activation, last):
        index = (row_offsets, columns, schedule)
        y = _forward(x, values, *index, shape, bias, activation, last)
        kept = y if activation == _RELU else None
        ctx.save_for_backward(x, values, *index, bias, kept)
        ctx.shape, ctx.activation = shape, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, values, *index, bias, before = ctx.saved_tensors
        shape = ctx.shape
        if ctx.activation:
            if before is None:  # the sum is computed again: cheaper than keeping it
                before = _forward(x, values, *index, shape, bias, 0, False)
            grad = activation_grad(grad, before, ctx.activation)
        grad = grad.contiguous()
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            run = _select(_op_x, reference.block_linear_grad_x, _widen(x))
            grad_x = run(_widen(grad), _widen(values), *index, shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            run = _select(_op_values, reference.block_linear_grad_values, _widen(x))
            block = (values.shape[2], values.shape[1])
            grad_values = run(_widen(grad), _widen(x.contiguous()), *index, block).to(x.dtype)
        if ctx.needs_input_grad[6]:
            grad_bias = grad.sum(0)
        return grad_x, grad_values, None, None, None, None, grad_bias, None, None


def _fake(x, values, row_offsets, columns, schedule, shape, bias, activation, batch_last):
    if batch_last:
        return x.new_empty(shape[0], x.shape[0]).t()
    return x.new_empty(x.shape[0], shape[0])


def _fake_grad_x(grad, values, row_offsets, columns, schedule, shape):
    return grad.new_empty(grad.shape[0], shape[1])


def _fake_grad_values(grad, x, row_offsets, columns, schedule, block):
    return x.new_empty(columns.shape[0], block[1], block[0])


def grad_x_by_dense(
    grad: Tensor, values: Tensor, row_offsets: Tensor, columns: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Return grad W [M, K] at dense cost: the weight is laid out for a dense product."""
    return grad @ blocks_to_dense(values, row_offsets, columns, shape)


def grad_values_by_dense(
    grad: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor, block: tuple[int, int]
) -> Tensor:
    """Return the gradient to the values [kept, bw, bh] at dense cost: kept blocks of grad^T x."""
    blocks = cut_blocks(grad.t() @ x, *block)
    return blocks[expand_rows(row_offsets, columns.numel()), columns.long()]


_library.register(_NAME, reference.block_linear, _fake)
_library.register(f"{_NAME}_grad_x", reference.block_linear_grad_x, _fake_grad_x)
_library.register(f"{_NAME}_grad_values", reference.block_linear_grad_values, _fake_grad_values)
_op = torch.ops.liveweight.block_linear.default
_op_x = torch.ops.liveweight.block_linear_grad_x.default
_op_values = torch.ops.liveweight.block_linear_grad_values.default

try:
    from liveweight.kernels import block_linear as _kernel
    from liveweight.kernels import block_linear_grad as _kernel_grad
    from liveweight.kernels import block_linear_narrow as _kernel_narrow
except ImportError:  # no Triton: the reference serves CUDA too, and lw.info() says why
    pass
else:
    _warned = False

    def _is_narrow(bh: int, bw: int) -> bool:
        """Return whether blocks are panels of few columns, which have a forward kernel alone."""
        return bh in _kernel_narrow.HEIGHTS and bw in _kernel_narrow.WIDTHS

    def _has_kernel(x: Tensor, bh: int, bw: int) -> bool:
        """Return whether the GPU's kernels serve these blocks; say once that they do not."""
        global _warned
        if (bh in _kernel.SIDES and bw in _kernel.SIDES) or _is_narrow(bh, bw):
            return x.dtype in _kernel.DTYPES  # float64 is there for gradient checks
        if not _warned:
            _warned = True
            sides, narrow = (", ".join(map(str, s)) for s in (_kernel.SIDES, _kernel_narrow.WIDTHS))
            warnings.warn(
                f"liveweight.{_NAME} runs its slow PyTorch reference on CUDA: blocks ({bh}, {bw}) "
                f"have no kernel there, blocks with {sides} rows and as many or {narrow} columns "
                "have",
                stacklevel=2,
            )
        return False

    def _launch(x, values, row_offsets, columns, schedule, shape, bias, activation, batch_last):
        bh, bw = values.shape[2], values.shape[1]
        index = (row_offsets, columns, schedule)
        if not _has_kernel(x, bh, bw):
            return reference.block_linear(x, values, *index, shape, bias, activation, batch_last)
        if _is_narrow(bh, bw):
            rest = (shape, bias, activation, batch_last)
            return _kernel_narrow.launch(x, values, *index, *rest)
        y = _kernel.launch(x.contiguous(), values, *index, shape, bias, activation)
        return y.t().contiguous().t() if batch_last else y

    def _launch_grad_x(grad, values, row_offsets, columns, schedule, shape):
        bh, bw = values.shape[2], values.shape[1]
        index = (row_offsets, columns, schedule)
        if not _has_kernel(grad, bh, bw):
            return reference.block_linear_grad_x(grad, values, *index, shape)
        if _is_narrow(bh, bw):
            return grad_x_by_dense(grad, values, row_offsets, columns, shape)
        return _kernel.launch_grad_x(grad, values, *index, shape)

    def _launch_grad_values(grad, x, row_offsets, columns, schedule, block):
        if not _has_kernel(grad, *block):
            index = (row_offsets, columns, schedule)
            return reference.block_linear_grad_values(grad, x, *index, block)
        run = grad_values_by_dense if _is_narrow(*block) else _kernel_grad.launch_grad_values
        return run(grad, x, row_offsets, columns, block)

    _library.register_triton(_NAME, _launch)
    _library.register_triton(f"{_NAME}_grad_x", _launch_grad_x)
    _library.register_triton(f"{_NAME}_grad_values", _launch_grad_values)
