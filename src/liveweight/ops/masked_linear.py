"""Linear layer with a dense weight under a bit mask: y = x (W o M)^T + b."""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight import _library, reference
from liveweight._check import check_tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OP = "masked_linear"


def pack_mask_bits(mask: Tensor) -> Tensor:
    """Pack a mask into bits, 32 columns a word.

    bits[n, w] has bit j set where mask[n, 32 w + j] is True; bits past K are 0.

    mask     [N, K] bool, True = kept
    returns  [N, ceil(K / 32)] int32

    Raises TypeError (dtype) and ValueError (shape).
    """
    check_tensor("pack_mask_bits", "mask", mask, dim=2, dtypes=(torch.bool,))
    N, K = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -K % 32)).view(N, (K + 31) // 32, 32)
    # int64: bit 31 is a sign in int32, which the last line gives it.
    word = (padded.long() << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


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
    grad_W = (G^T x) o M, grad_b = sum of G. On CUDA, wholly masked blocks of W are skipped, so x
    should be finite: its inf or NaN meet a masked weight only in the blocks that are not.
    Raises TypeError (types, dtypes) and ValueError (shapes, devices).
    """
    _check(x, weight, mask_bits, bias)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    weight, mask_bits = weight.contiguous(), mask_bits.contiguous()
    inputs = (flat, weight) if bias is None else (flat, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        y = _MaskedLinear.apply(flat, weight, mask_bits, bias)
    else:
        y = _op(flat, weight, mask_bits, bias)
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


class _MaskedLinear(torch.autograd.Function):
    """Gradients in plain PyTorch, so that they can be differentiated again."""

    @staticmethod
    def forward(ctx, x, weight, mask_bits, bias):
        ctx.save_for_backward(x, weight, mask_bits)
        return _op(x, weight, mask_bits, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mask_bits = ctx.saved_tensors
        removed = ~reference.unpack_mask_bits(mask_bits, weight.shape[1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.masked_fill(removed, 0)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.t() @ x).masked_fill(removed, 0)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, None, grad_bias


def _fake(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_library.register(_OP, reference.masked_linear, _fake)
_op = torch.ops.liveweight.masked_linear.default

try:
    from liveweight.kernels import masked_linear as _kernel
except ImportError:  # no Triton: the reference serves CUDA too, and lw.info() says why
    pass
else:

    def _launch(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None) -> Tensor:
        # float64 has no tile: it is there for gradient checks.
        run = reference.masked_linear if x.dtype == torch.float64 else _kernel.launch
        return run(x, weight, mask_bits, bias)

    _library.register_triton(_OP, _launch)
