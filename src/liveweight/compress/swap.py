"""The one place that knows how sparse modules are made from dense ones and read back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from liveweight import nn as sparse_nn
from liveweight.formats import Block, Kernelwise
from liveweight.formats.block import GPU_COSTS
from liveweight.nn.sparse_linear import GPU_LAYOUTS, fits_two_of_four
from liveweight.nn.sparse_module import read_dense

# Samples up to which a product on a GPU waits for the weight and not for the input.
FEW_SAMPLES = 64

_SPARSE: dict[type, type] = {nn.Linear: sparse_nn.SparseLinear, nn.Conv2d: sparse_nn.SparseConv2d}


def formats_of(kind: type) -> Mapping[str, str]:
    """Return format -> op for a dense type: nn.Linear or nn.Conv2d; empty for others."""
    return _SPARSE[kind].ops if kind in _SPARSE else {}


def format_names() -> tuple[str, ...]:
    """Return the names of all formats, each once."""
    return tuple(dict.fromkeys(name for kind in _SPARSE for name in formats_of(kind)))


def format_on(name: str, weight: Tensor) -> str:
    """Return the format of a checkpoint's layer on the device of its weight.

    What a GPU laid out for itself is stored as any device does elsewhere.
    """
    return name if weight.is_cuda else GPU_LAYOUTS.get(name, name)


def why_not(name: str, layer: nn.Module) -> str:
    """Return why a format cannot store a layer of a GPU, "" where it can."""
    weight = read_dense(layer, "weight")
    if name in GPU_LAYOUTS and weight.dtype not in (torch.bfloat16, torch.float16):
        return f"{name} takes bfloat16 and float16, not {str(weight.dtype).removeprefix('torch.')}"
    if name == "semi_structured" and not fits_two_of_four(weight):
        return "its zeros are no 2:4 pattern"
    return ""


def is_sparse(module: nn.Module) -> bool:
    """True for a SparseLinear or SparseConv2d."""
    return isinstance(module, tuple(_SPARSE.values()))


def dense_type(module: nn.Module) -> type | None:
    """Return nn.Linear or nn.Conv2d for a sparse module, None for any other."""
    return next((dense for dense, kind in _SPARSE.items() if isinstance(module, kind)), None)


def format_name(module: nn.Module) -> str:
    """Return the name of the format that a sparse module computes in."""
    return module.format


def make_sparse(
    dense: nn.Module,
    name: str,
    *,
    activation: str | None = None,
    pool: int = 1,
    parts: tuple[str, ...] = (),
    keep: Tensor | None = None,
    layout: str | None = None,
    block: tuple[int, int] | None = None,
    samples: int | None = None,
) -> nn.Module:
    """Return the sparse module of a Linear or Conv2d; zeros of its weight are the pattern.

    parts  names of the modules it stands for
    keep   bool, entries or whole kernels that stay in the pattern although they are zero
    layout  of a convolution's output; None: like its input
    block   (rows, columns) for the format "block"; None: what its from_dense takes
    samples  rows of a Linear's input, where a format's layout depends on them

    Raises what its from_dense raises.
    """
    if isinstance(dense, nn.Linear):
        options = {"activation": activation, "mask": keep, "block": block, "samples": samples}
        module = sparse_nn.SparseLinear.from_dense(dense, name, **options)
    else:
        module = sparse_nn.SparseConv2d.from_dense(
            dense, name, activation=activation, pool=pool, mask=keep, block=block
        )
        module.layout = layout
    module.parts = tuple(parts)
    module.values.requires_grad_(dense.weight.requires_grad)
    if module.bias is not None:
        module.bias.requires_grad_(dense.bias.requires_grad)
    return module


def gpu_block(dense: nn.Linear, samples: int) -> tuple[int, int]:
    """Return the block to store a Linear's weight in for so many samples on a GPU.

    For few, reading the weight is all there is to do and the fewest stored entries win; for many,
    reads of the input count, and taller blocks can win although they store more.
    """
    sizes = GPU_COSTS if samples > FEW_SAMPLES else tuple(GPU_COSTS)
    return Block.best_block(read_dense(dense, "weight"), sizes)[0]


def dense_like(
    old: nn.Module, sizes: Mapping[str, int], weight: Tensor, bias: Tensor | None
) -> nn.Module:
    """Return a Linear or Conv2d like old with these sizes and tensors, on old's device."""
    device, needs_grad = old.weight.device, old.weight.requires_grad
    options: dict[str, object] = {"device": "meta", "bias": bias is not None}
    if isinstance(old, nn.Conv2d):
        for key in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            options[key] = getattr(old, key)
    dense = type(old)(**sizes, **options)
    dense.weight = nn.Parameter(weight.to(device), requires_grad=needs_grad)
    if bias is not None:
        dense.bias = nn.Parameter(bias.to(device), requires_grad=needs_grad)
    return dense


@torch.no_grad()
def dense_weight(module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (weight, kept entries, kept kernels) of a sparse module, for a checkpoint.

    The kept kernels are None where they follow from the kept entries; entries that are zero
    inside a kept kernel are not kept, and come back as +0.0.
    """
    sparse = module.pack()
    weight = sparse.to_dense()
    kept = sparse.mask()
    if not isinstance(sparse, Kernelwise):
        return weight, kept, None
    kernels = kept.flatten(2).any(2)
    entries = weight.ne(0)
    follows = torch.equal(entries.flatten(2).any(2), kernels)
    return weight, entries, None if follows else kernels
