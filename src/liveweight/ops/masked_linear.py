"""Linear layer with a dense weight under a bit mask: y = x (W o M)^T + b."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from liveweight import _library, reference
from liveweight._check import check_tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OP = "masked_linear"


def pack_mask_bits(mask: Tensor) -> Tensor:
    """Pack a mask into bits, 32 columns a word.

    bits[n, w] has bit j set where mask[n, 32 w + j] is True; bits past K are 0. On CUDA one kernel
    that reads the mask once, for masks that change from step to step.

    mask     [N, K] bool, True = kept
    returns  [N, ceil(K / 32)] int32

    Raises TypeError (dtype) and ValueError (shape).
    """
    check_tensor("pack_mask_bits", "mask", mask, dim=2, dtypes=(torch.bool,))
    return _op_pack(mask.contiguous())


def unpack_mask_bits(bits: Tensor, K: int) -> Tensor:
    """Return the mask [N, K] bool that pack_mask_bits packed into bits [N, ceil(K / 32)] int32.

    Raises TypeError (dtype) and ValueError (shape).
    """
    check_tensor("unpack_mask_bits", "bits", bits, dim=2, dtypes=(torch.int32,))
    if bits.shape[1] != (K + 31) // 32:
        raise ValueError(
            f"unpack_mask_bits: expected bits [N, {(K + 31) // 32}] for K = {K}, "
            f"got {tuple(bits.shape)}"
        )
    return reference.unpack_mask_bits(bits, K)


def masked_linear(
    x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Apply a linear layer whose weight is masked on the way in: y = x (W o M)^T + b.

    x          [..., K] float32, bfloat16, float16 or float64
    weight     [N, K], dtype of x; masked entries are never used, whatever they hold
    mask_bits  [N, ceil(K / 32)] int32 from pack_mask_bits
    bias       [N], dtype of x, or None
    returns    [..., N] like x; float16 and bfloat16 are accumulated in float32

    Differentiable in x, weight and bias, any number of times: grad_x = G (W o M),
    grad_W = (G^T x) o M, grad_b = sum of G. On CUDA, wholly masked tiles of W are skipped, forward
    and in both gradients, and nowhere is there a masked copy of W. So x and G should be finite:
    their inf or NaN meet a masked weight only in the tiles that are not skipped.
    Raises TypeError (types, dtypes) and ValueError (shapes, devices).
    """
    _check(x, weight, mask_bits, bias)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    y = _forward(flat, weight.contiguous(), mask_bits.contiguous(), bias)
    return y.reshape(*x.shape[:-1], y.shape[1])


def _check(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None) -> None:
    check_tensor(_OP, "x", x, dtypes=_DTYPES)
    check_tensor(_OP, "weight", weight, dim=2, dtypes=(x.dtype,), device=x.device)
    check_tensor(_OP, "mask_bits", mask_bits, dim=2, dtypes=(torch.int32,), device=x.device)
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"{_OP}: expected x [..., {K}] for weight [{N}, {K}], got {_shape(x)}")
    if mask_bits.shape != (N, (K + 31) // 32):
        raise ValueError(
            f"{_OP}: expected mask_bits [{N}, {(K + 31) // 32}] for weight [{N}, {K}], "
            f"got {_shape(mask_bits)}"
        )
    if bias is not None:
        check_tensor(_OP, "bias", bias, dim=1, dtypes=(x.dtype,), device=x.device)
        if bias.shape[0] != N:
            raise ValueError(f"{_OP}: expected bias [{N}], got {_shape(bias)}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


# The three products are closed under differentiation: the gradients of each are the other two, so
# that y can be differentiated any number of times by the same kernels.


def _forward(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None) -> Tensor:
    return _run(_MaskedLinear, _op, x, weight, mask_bits, bias)


def _grad_x(grad: Tensor, weight: Tensor, mask_bits: Tensor) -> Tensor:
    return _run(_GradX, _op_x, grad.contiguous(), weight, mask_bits)


def _grad_weight(grad: Tensor, x: Tensor, mask_bits: Tensor) -> Tensor:
    return _run(_GradWeight, _op_weight, grad.contiguous(), x, mask_bits)


def _run(function, op, *args) -> Tensor:
    wanted = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in args)
    return function.apply(*args) if wanted else op(*args)


class _MaskedLinear(torch.autograd.Function):
    """y = x (W o M)^T + b: grad_x = G (W o M), grad_W = (G^T x) o M, grad_b = sum of G."""

    @staticmethod
    def forward(ctx, x, weight, mask_bits, bias):
        ctx.save_for_backward(x, weight, mask_bits)
        return _op(x, weight, mask_bits, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mask_bits = ctx.saved_tensors
        needs_x, needs_weight, _, needs_bias = ctx.needs_input_grad
        return (
            _grad_x(grad, weight, mask_bits) if needs_x else None,
            _grad_weight(grad, x, mask_bits) if needs_weight else None,
            None,
            grad.sum(0) if needs_bias else None,
        )


class _GradX(torch.autograd.Function):
    """z = g (W o M): for a gradient C of z, grad_g = C (W o M)^T and grad_W = (g^T C) o M."""

    @staticmethod
    def forward(ctx, g, weight, mask_bits):
        ctx.save_for_backward(g, weight, mask_bits)
        return _op_x(g, weight, mask_bits)

    @staticmethod
    def backward(ctx, grad):
        g, weight, mask_bits = ctx.saved_tensors
        needs_g, needs_weight, _ = ctx.needs_input_grad
        return (
            _forward(grad.contiguous(), weight, mask_bits, None) if needs_g else None,
            _grad_weight(g, grad.contiguous(), mask_bits) if needs_weight else None,
            None,
        )


class _GradWeight(torch.autograd.Function):
    """V = (g^T x) o M: for a gradient C of V, grad_g = x (C o M)^T and grad_x = g (C o M)."""

    @staticmethod
    def forward(ctx, g, x, mask_bits):
        ctx.save_for_backward(g, x, mask_bits)
        return _op_weight(g, x, mask_bits)

    @staticmethod
    def backward(ctx, grad):
        g, x, mask_bits = ctx.saved_tensors
        needs_g, needs_x, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            _forward(x, grad, mask_bits, None) if needs_g else None,
            _grad_x(g, grad, mask_bits) if needs_x else None,
            None,
        )


def _fake_pack(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0], (mask.shape[1] + 31) // 32, dtype=torch.int32)


def _fake(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_x(grad: Tensor, weight: Tensor, mask_bits: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1])


def _fake_weight(grad: Tensor, x: Tensor, mask_bits: Tensor) -> Tensor:
    return x.new_empty(grad.shape[1], x.shape[1])


_library.register("pack_mask_bits", reference.pack_mask_bits, _fake_pack)
_library.register(_OP, reference.masked_linear, _fake)
_library.register(f"{_OP}_grad_x", reference.masked_linear_grad_x, _fake_x)
_library.register(f"{_OP}_grad_weight", reference.masked_linear_grad_weight, _fake_weight)
_op_pack = torch.ops.liveweight.pack_mask_bits.default
_op = torch.ops.liveweight.masked_linear.default
_op_x = torch.ops.liveweight.masked_linear_grad_x.default
_op_weight = torch.ops.liveweight.masked_linear_grad_weight.default

try:
    from liveweight.kernels import mask_bits as _bits
    from liveweight.kernels import masked_linear as _kernel
    from liveweight.kernels.masked_linear_grad import launch_grad_weight
except ImportError:  # no Triton: the reference serves CUDA too, and lw.info() says why
    pass
else:

    def _serve(name: str, launch: Callable) -> None:
        plain = getattr(reference, name)

        def run(first: Tensor, *args) -> Tensor:
            # float64 has no tile: it is there for gradient checks.
            return (plain if first.dtype == torch.float64 else launch)(first, *args)

        _library.register_triton(name, run)

    _library.register_triton("pack_mask_bits", _bits.pack)
    _serve(_OP, _kernel.launch)
    _serve(f"{_OP}_grad_x", _kernel.launch_grad_x)
    _serve(f"{_OP}_grad_weight", launch_grad_weight)
