"""patch_gram and gram_norms_: norms of every kernel's response without forming a response."""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight import _library, reference
from liveweight._check import check_tensor, make_pair

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_TAPS = 128  # of a kernel: the packed triangle has 8256 entries then


def _four_sides(padding: int | tuple[int, ...]) -> list[int]:
    """Return (top, bottom, left, right) of a number, (height, width) or all four."""
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        return [*make_pair("patch_gram", "padding", tuple(padding[:2]), 0), *padding[2:]]
    high, wide = make_pair("patch_gram", "padding", padding, 0)
    return [high, high, wide, wide]


def _positions(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + padding - dilation * (kernel - 1) - 1) // stride + 1


def patch_gram(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Return the Gram matrix, per sample and channel, of the patches of |x| a convolution reads.

        gram[n, c] = sum_p |u_p| |u_p|^T,    u_p the T = kh * kw pixels of x[n, c] at position p

    so that |k|^T gram[n, c] |k| is the squared Frobenius norm of the response |k| * |x[n, c]|.

    x            [N, C, H, W]  float32, bfloat16 or float16, any strides; sums are fp32
    kernel_size  number or (kh, kw), kh * kw <= 128; stride, dilation: the same
    padding      zeros: number, (height, width) or (top, bottom, left, right)
    returns      [N, C, T (T + 1) / 2]  float32, the upper triangle row by row

    Raises TypeError for a wrong dtype, ValueError for a wrong shape or size and where the kernel
    does not fit into the padded maps. Takes no part in gradients.
    """
    check_tensor("patch_gram", "x", x, dim=4, dtypes=_DTYPES)
    kernel = make_pair("patch_gram", "kernel_size", kernel_size, 1)
    stride = make_pair("patch_gram", "stride", stride, 1)
    dilation = make_pair("patch_gram", "dilation", dilation, 1)
    sides = _four_sides(padding)
    if not all(isinstance(v, int) and v >= 0 for v in sides):
        raise ValueError(f"patch_gram: padding must be whole numbers >= 0, got {padding!r}")
    if kernel[0] * kernel[1] > MOST_TAPS:
        raise ValueError(
            f"patch_gram: kernel_size must have at most {MOST_TAPS} taps, got {kernel[0]} x "
            f"{kernel[1]}"
        )
    for i, side in enumerate(("rows", "columns")):
        before, after = sides[2 * i], sides[2 * i + 1]
        if _positions(x.shape[2 + i], kernel[i], 1, before + after, dilation[i]) < 1:
            raise ValueError(
                f"patch_gram: a window of {kernel[i]} with dilation {dilation[i]} does not fit "
                f"into {x.shape[2 + i] + before + after} padded {side}"
            )
    return _patch_gram(x.detach(), kernel, stride, sides, dilation)


def gram_norms_(sums: Tensor, gram: Tensor, weight: Tensor) -> Tensor:
    """Add, for every kernel, the norms of its responses to all samples.

        sums[o, i] += sum_n sqrt(|k_oi|^T gram[n, c] |k_oi|),   c the channel that k_oi reads

    sums     [Cout, C/g]  float64, changed in place
    gram     [N, C, T (T + 1) / 2]  float32, of patch_gram
    weight   [Cout, C/g, kh, kw] or [Cout, C/g, T]  float32, bfloat16 or float16, T = kh * kw
    returns  sums; on CUDA the additions have a fixed order, so the bits repeat

    Raises TypeError for a wrong dtype, ValueError for a wrong shape or device.
    """
    op = "gram_norms_"
    check_tensor(op, "gram", gram, dim=3, dtypes=(torch.float32,))
    check_tensor(op, "weight", weight, dtypes=_DTYPES, device=gram.device)
    check_tensor(op, "sums", sums, dim=2, dtypes=(torch.float64,), device=gram.device)
    if weight.dim() not in (3, 4):
        raise ValueError(f"{op}: weight must be [Cout, C/g, kh, kw], got {tuple(weight.shape)}")
    kernels = weight.detach().flatten(2).float()
    out, per_group, taps = kernels.shape
    if not 1 <= taps <= MOST_TAPS:
        raise ValueError(f"{op}: weight must have 1 to {MOST_TAPS} taps, got {taps}")
    if gram.shape[2] != taps * (taps + 1) // 2:
        raise ValueError(
            f"{op}: gram of {taps} taps must have {taps * (taps + 1) // 2} entries, got "
            f"{gram.shape[2]}"
        )
    channels = gram.shape[1]
    groups = channels // per_group if per_group else 0
    if per_group and (groups * per_group != channels or (groups and out % groups)):
        raise ValueError(
            f"{op}: weight {list(kernels.shape)} does not belong to gram's {channels} channels: "
            "expected channels a multiple of weight's, filters a multiple of the groups"
        )
    if sums.shape != (out, per_group):
        raise ValueError(f"{op}: sums must be [{out}, {per_group}], got {list(sums.shape)}")
    if not sums.is_contiguous():
        raise ValueError(f"{op}: sums must be contiguous, got strides {sums.stride()}")
    _gram_norms(sums, gram.detach().contiguous(), kernels.contiguous())
    return sums


def _fake_gram(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    taps = kernel_size[0] * kernel_size[1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], x.shape[1], taps * (taps + 1) // 2, dtype=dtype)


def _fake_norms(sums: Tensor, gram: Tensor, weight: Tensor) -> None:
    return None


_library.register("patch_gram", reference.patch_gram, _fake_gram)
_library.register("gram_norms_", reference.gram_norms_, _fake_norms)
_patch_gram = torch.ops.liveweight.patch_gram.default
_gram_norms = torch.ops.liveweight.gram_norms_.default
