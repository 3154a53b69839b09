"""Norms of the response of every 2-D kernel, without computing a single response map.

For a kernel k and a non-negative input map, the response at one output position is the product of
|k| with that position's patch. With U [r*s, P] the patches of all P output positions as columns,

    fro    || |k| * x ||_F = sqrt(|k|^T (U U^T) |k|)
    l1     sum over positions = |k|^T U 1

so a layer needs one r*s x r*s Gram matrix (or one vector) per input channel, whatever the number of
filters. Stride, padding and dilation only decide which patches U holds. On CUDA the Gram matrices
come from ops.patch_gram, which reads the maps once and never forms U; on a CPU, from U itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveweight.ops.patch_gram import MOST_TAPS, gram_norms_, patch_gram
from liveweight.prune.activity import Counted

_CHUNK_BYTES = 64 << 20


def _sides(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return the padding of a convolution: top, bottom, left, right."""
    if conv.padding == "valid":
        return (0, 0, 0, 0)
    if conv.padding == "same":
        # torch puts the odd pixel of an even kernel behind: floor(d*(k-1)/2) before.
        extra = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        top, left = extra[0] // 2, extra[1] // 2
        return (top, extra[0] - top, left, extra[1] - left)
    return (conv.padding[0], conv.padding[0], conv.padding[1], conv.padding[1])


def _pad(conv: nn.Conv2d, x: Tensor) -> Tensor:
    top, bottom, left, right = sides = _sides(conv)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, (left, right, top, bottom), mode=mode) if any(sides) else x


def patches(conv: nn.Conv2d, maps: Tensor) -> Tensor:
    """Return the patches that a convolution reads: maps [N, C, H, W] -> [N, C, r*s, P]."""
    n, channels = maps.shape[:2]
    padded = _pad(conv, maps).flatten(0, 1).unsqueeze(1)  # [N*C, 1, H', W']
    columns = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    return columns.unflatten(0, (n, channels))


def _by_group(conv: nn.Conv2d, weight: Tensor) -> Tensor:
    """|weight| [Cout, C/g, r, s] -> [g, C/g, Cout/g, r*s]."""
    kernels = weight.abs().flatten(2).unflatten(0, (conv.groups, -1))
    return kernels.transpose(1, 2)


def _from_group(scores: Tensor) -> Tensor:
    """[..., g, C/g, Cout/g] -> [..., Cout, C/g]."""
    return scores.transpose(-1, -2).flatten(-3, -2)


def _gram(columns: Tensor) -> Tensor:
    return columns @ columns.transpose(-1, -2)


def _is_fused(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether patch_gram has a kernel for these maps."""
    return x.is_cuda and conv.kernel_size[0] * conv.kernel_size[1] <= MOST_TAPS


def _add_fused(sums: Tensor, conv: nn.Conv2d, weight: Tensor, x: Tensor) -> None:
    """Add the norms of every kernel's responses to x [N, C, H, W] to sums [Cout, C/groups]."""
    sides = _sides(conv)
    if conv.padding_mode != "zeros":
        x, sides = _pad(conv, x), (0, 0, 0, 0)
    taps = weight.shape[2] * weight.shape[3]
    per_sample = 4 * x.shape[1] * taps * (taps + 1) // 2
    for part in x.split(max(1, _CHUNK_BYTES // max(per_sample, 1))):
        gram = patch_gram(
            part,
            conv.kernel_size,
            stride=conv.stride,
            padding=sides,
            dilation=conv.dilation,
        )
        gram_norms_(sums, gram, weight)


def kernel_norms(conv: nn.Conv2d, weight: Tensor, mean_map: Tensor, norm: str) -> Tensor:
    """Return the norm of |k| * mean_map for every kernel: float64 [Cout, C/groups].

    weight    [Cout, C/groups, r, s]
    mean_map  [C, H, W], non-negative
    norm      "fro" or "l1"
    """
    if norm == "fro" and _is_fused(conv, mean_map):
        sums = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device)
        _add_fused(sums, conv, weight.float(), mean_map.float().unsqueeze(0))
        return sums
    columns = patches(conv, mean_map.double().unsqueeze(0))[0]  # [C, r*s, P]
    kernels = _by_group(conv, weight)
    if norm == "l1":
        sums = columns.sum(-1).unflatten(0, (conv.groups, -1))  # [g, C/g, r*s]
        return _from_group((kernels.double() @ sums.unsqueeze(-1)).squeeze(-1))
    # Every term is non-negative, so float32 loses nothing to cancellation.
    gram = _gram(columns).unflatten(0, (conv.groups, -1)).float()  # [g, C/g, r*s, r*s]
    kernels = kernels.float()
    return _from_group(((kernels @ gram) * kernels).sum(-1).sqrt()).double()


def weight_norms(conv: nn.Conv2d, weight: Tensor, mean_map: Tensor, norm: str) -> Tensor:
    """Return the norm of the response of every single weight: float64 [Cout, C/groups, r, s]."""
    columns = patches(conv, mean_map.double().unsqueeze(0))[0]
    reach = columns.sum(-1) if norm == "l1" else columns.square().sum(-1).sqrt()  # [C, r*s]
    reach = reach.unflatten(0, (conv.groups, -1)).unsqueeze(2)  # [g, C/g, 1, r*s]
    scores = _by_group(conv, weight).double() * reach
    return scores.transpose(1, 2).flatten(0, 1).unflatten(-1, conv.kernel_size)


def output_positions(conv: nn.Conv2d, shape: tuple[int, int, int]) -> int:
    """Return h*w of the layer's output for an input of shape (C, H, W)."""
    probe = torch.empty(1, shape[0], *shape[1:], device="meta")
    size = _pad(conv, probe).shape[2:]
    spans = zip(size, conv.kernel_size, conv.stride, conv.dilation, strict=True)
    return torch.Size((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in spans).numel()


class MeanKernelNorms(Counted):
    """Mean over samples of every kernel's response norm, for one fixed weight: the paper's score.

    mean      float64 [Cout, C/groups]
    shape     (C, H, W) of the input
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self._conv = conv
        self._weight = conv.weight.detach().abs().float().contiguous()
        self._kernels = _by_group(conv, self._weight)
        self._sum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        x = (x if x.dim() == 4 else x.unsqueeze(0)).detach()
        if self._sum is None:
            self._start(x)
        self._check_shape(tuple(x.shape[1:]))
        if self._sum is None:
            size = self._weight.shape[:2]
            self._sum = torch.zeros(size, dtype=torch.float64, device=x.device)
        if _is_fused(self._conv, x):
            narrow = x if x.dtype in (torch.bfloat16, torch.float16) else x.float()
            _add_fused(self._sum, self._conv, self._weight, narrow)
        else:
            self._add_unfolded(x.abs().float())
        self._count(x.shape[0])

    def _add_unfolded(self, x: Tensor) -> None:
        window = self._kernels.shape[-1]
        per_sample = 4 * window * max(self._kernels[..., 0].numel(), x.shape[1:].numel())
        for part in x.split(max(1, _CHUNK_BYTES // max(per_sample, 1))):
            gram = _gram(patches(self._conv, part)).unflatten(1, (self._conv.groups, -1))
            norms = ((self._kernels @ gram) * self._kernels).sum(-1).sqrt()  # [n, g, C/g, Cout/g]
            self._sum += _from_group(norms.double().sum(0))

    def reset(self) -> None:
        super().reset()
        if self._sum is not None:
            self._sum.zero_()

    def check(self, name: str) -> None:
        if not torch.isfinite(self._sum).all():
            raise ValueError(
                f"layer '{name}' saw NaN or infinite activations; scores need finite ones"
            )

    @property
    def mean(self) -> Tensor:
        return self._sum / max(self.samples, 1)
