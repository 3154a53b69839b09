"""Linear layers under a bit mask, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_mask_bits(mask: Tensor) -> Tensor:
    """Return the bits [N, ceil(K / 32)] int32 of mask [N, K] bool, bit k % 32 of word k // 32."""
    N, K = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -K % 32)).view(N, (K + 31) // 32, 32)
    # int64: bit 31 is a sign in int32, which the last line gives it.
    word = (padded.long() << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def unpack_mask_bits(bits: Tensor, K: int) -> Tensor:
    """Return the mask [N, K] bool of bits [N, ceil(K / 32)] int32, bit k % 32 of word k // 32."""
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    mask = (bits[:, :, None] >> places) & 1  # [N, ceil(K / 32), 32]
    return mask.reshape(bits.shape[0], 32 * bits.shape[1])[:, :K].bool()


def masked_linear(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (W o M)^T + bias [M, N] for x [M, K], W [N, K] and M from mask_bits.

    Sums run in float32 (float64 for float64) and are rounded once, to the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = weight.masked_fill(~unpack_mask_bits(mask_bits, weight.shape[1]), 0).to(wide)
    y = x.to(wide) @ kept.t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def masked_linear_grad_x(grad: Tensor, weight: Tensor, mask_bits: Tensor) -> Tensor:
    """Return grad (W o M) [M, K] for grad [M, N]: the gradient of masked_linear to x.

    Sums as in masked_linear.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    kept = weight.masked_fill(~unpack_mask_bits(mask_bits, weight.shape[1]), 0).to(wide)
    return (grad.to(wide) @ kept).to(grad.dtype)


def masked_linear_grad_weight(grad: Tensor, x: Tensor, mask_bits: Tensor) -> Tensor:
    """Return (grad^T x) o M [N, K] for grad [M, N], x [M, K]: the gradient to the weight.

    Sums as in masked_linear.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    product = grad.to(wide).t() @ x.to(wide)
    return product.masked_fill_(~unpack_mask_bits(mask_bits, x.shape[1]), 0).to(x.dtype)
