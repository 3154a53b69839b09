"""Selection and convolution scores beside what plain PyTorch and the paper's program do."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from gpu_timing import sets_needed
from torch import Tensor, nn

from gpu import rows
from gpu.rows import Case, check, short
from liveweight import ops
from liveweight.prune.kernel_response import MeanKernelNorms

# Rows and columns of the scores: an LLM's layer, a small one, one long row.
SCORES = ((4096, 14336), (300, 784), (64, 262144))
SPARSITY = 0.9
# Batch, channels in and out, side of the picture: layers of VGG-16 on CIFAR-10 and on ImageNet.
VGG = ((256, 64, 128, 16, torch.float32), (64, 256, 256, 28, torch.bfloat16))


def selection_cases() -> Iterator[Case]:
    """Yield mass_mask and top_k_mask beside a sort and a cumulative sum, and beside topk."""
    for shape in SCORES:
        sets = min(8, sets_needed(4 * shape[0] * shape[1], rows.l2_bytes()))
        scores = [torch.rand(shape, device=rows.DEVICE).square_() for _ in range(sets)]
        moved = (0.0, 4.0 * scores[0].numel())
        for op, ours, plain in (_mass(scores), _top_k(scores)):
            where = {"op": op, "shape": list(shape)}
            work = dict.fromkeys((*ours, *plain), moved)
            name = f"{op} {list(shape)} fp32"
            yield Case("selection", name, where, ours, plain, {}, work, sets)


def _mass(scores: list[Tensor]) -> tuple[str, dict, dict]:
    alpha = 0.9

    def sorting(i: int) -> Tensor:
        ranked, order = scores[i].sort(dim=1, descending=True, stable=True)
        mass = ranked.cumsum(1, dtype=torch.float64)
        keep = (mass - ranked) < alpha * mass[:, -1:]
        return torch.zeros_like(keep).scatter_(1, order, keep)

    run = torch.ops.liveweight.mass_mask.default
    kept, want = run(scores[0], alpha, False), sorting(0)
    if int((kept != want).sum()) > scores[0].shape[0]:  # ties of rounding: one of a row at most
        raise RuntimeError("mass_mask: keeps other scores than a sort does")
    return "mass_mask", {"mass_mask": lambda i: run(scores[i], alpha, False)}, {"sort": sorting}


def _top_k(scores: list[Tensor]) -> tuple[str, dict, dict]:
    k = round((1 - SPARSITY) * scores[0].shape[1])

    def sorting(i: int) -> Tensor:
        best = scores[i].topk(k, dim=1, sorted=False).indices
        return torch.zeros_like(scores[i], dtype=torch.bool).scatter_(1, best, True)

    if not bool((ops.top_k_mask(scores[0], k).sum(1) == k).all()):
        raise RuntimeError("top_k_mask: keeps another number than k")
    return "top_k_mask", {"top_k_mask": lambda i: ops.top_k_mask(scores[i], k)}, {"topk": sorting}


def conv_cases() -> Iterator[Case]:
    """Yield the scores of every kernel of a convolution: mean over samples of response norms."""
    for batch, inputs, outputs, side, dtype in VGG:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, device=rows.DEVICE)
        conv = conv.to(dtype)
        x = torch.rand(batch, inputs, side, side, device=rows.DEVICE, dtype=dtype)

        def ours(i: int, conv=conv, x=x) -> Tensor:
            norms = MeanKernelNorms(conv)
            norms.update(x)
            return norms.mean

        def by_filter(i: int, conv=conv, x=x) -> Tensor:
            """Convolve every map with every kernel, filter by filter, as the paper's program."""
            maps, found = x.float().abs(), []
            for kernels in conv.weight.detach().float().abs():
                options = {"padding": 1, "groups": maps.shape[1]}
                responses = F.conv2d(maps, kernels.unsqueeze(1), **options)
                found.append(responses.flatten(2).norm(dim=2).mean(0))
            return torch.stack(found)

        check("conv scores", ours(0), by_filter(0), 1e-4)
        where = {"op": "conv scores", "shape": [batch, inputs, outputs, side]}
        work = {"fused": (0.0, float(x.numel() * dtype.itemsize))}
        name = f"[{batch}, {inputs}, {side}, {side}] to {outputs} {short(dtype)}"
        loop = {"a grouped convolution per filter": by_filter}
        yield Case("conv scores", name, where, {"fused": ours}, loop, {}, work, sets=1)
