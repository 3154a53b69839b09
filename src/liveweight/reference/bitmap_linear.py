"""Linear layers with single weights missing, told by bits, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from liveweight.formats import bitmap
from liveweight.reference.activation import apply_activation


def bitmap_linear(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    most: int,
    bias: Tensor | None,
    activation: int,
) -> Tensor:
    """Return act(x W^T + bias) [M, N] for x [M, K] and the parts of a formats.Bitmap.

    As a dense layer does, it multiplies pruned weights as zeros: inf and NaN of x reach every
    output of their sample. Sums run in fp32 where x is narrower.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = bitmap.bitmap_to_dense(values, bits, offsets, tuple(shape)).to(wide)
    out = functional.linear(x.to(wide), weight, bias if bias is None else bias.to(wide))
    return apply_activation(out, activation).to(x.dtype)


def bitmap_to_dense(
    values: Tensor, bits: Tensor, offsets: Tensor, shape: Sequence[int], most: int
) -> Tensor:
    """Return W [N, K] for the parts of a formats.Bitmap."""
    return bitmap.bitmap_to_dense(values, bits, offsets, tuple(shape)).contiguous()


def bitmap_linear_grad_values(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    most: int,
) -> Tensor:
    """Return sum over m of grad[m, n] x[m, k] for each kept (n, k), laid out like values."""
    wide = torch.promote_types(x.dtype, torch.float32)
    product = grad.to(wide).t() @ x.to(wide)
    return bitmap.bitmap_gather(product.to(x.dtype), bits, offsets, values.numel())
