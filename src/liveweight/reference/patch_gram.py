"""Gram matrices of convolution patches, and norms of responses from them, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_gram(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Return sum_p |u_p| |u_p|^T of the patches u_p of each map, packed upper triangles.

    x [N, C, H, W] -> [N, C, T (T + 1) / 2], float64 for float64 x, else float32
    """
    top, bottom, left, right = padding
    maps = x.detach().abs().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    taps = kernel_size[0] * kernel_size[1]
    row, column = torch.triu_indices(taps, taps, device=x.device)
    if maps.numel() == 0:
        return maps.new_zeros(*x.shape[:2], row.numel())
    padded = F.pad(maps, (left, right, top, bottom)).flatten(0, 1).unsqueeze(1)
    columns = F.unfold(padded, kernel_size, dilation, 0, stride)  # [N*C, T, P]
    gram = columns @ columns.transpose(1, 2)
    return gram[:, row, column].unflatten(0, x.shape[:2])


def gram_norms_(sums: Tensor, gram: Tensor, weight: Tensor) -> None:
    """Add sum_n sqrt(|k|^T gram_n |k|) to sums [Cout, C/g], for every kernel k of weight.

    gram [N, C, T (T + 1) / 2] packed, weight [Cout, C/g, T]
    """
    if gram.numel() == 0 or weight.numel() == 0:
        return
    taps, per_group = weight.shape[2], weight.shape[1]
    row, column = torch.triu_indices(taps, taps, device=gram.device)
    kernels = weight.detach().abs().to(gram.dtype)
    products = kernels[..., row] * kernels[..., column]  # [Cout, C/g, E]
    products = torch.where(row == column, products, 2 * products)
    groups = gram.shape[1] // per_group
    products = products.unflatten(0, (groups, -1)).permute(0, 2, 3, 1)  # [g, C/g, E, Cout/g]
    forms = gram.unflatten(1, (groups, per_group)).permute(1, 2, 0, 3) @ products
    norms = forms.sqrt().double().sum(2)  # [g, C/g, Cout/g]
    sums += norms.transpose(1, 2).flatten(0, 1)
