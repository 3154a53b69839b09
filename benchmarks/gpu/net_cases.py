"""Whole nets: a training step under blocks, and compress_ against every dense form of a net."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import liveweight as lw
from gpu import rows
from gpu.rows import Case, random_blocks
from liveweight.compress.compiled import compile_strongest

DTYPE = torch.bfloat16
# Width of a ViT-S, its MLP's hidden width, tokens of a batch of 64 pictures of 197 patches.
VIT_S = (384, 1536, 64 * 197)
BLOCK = (64, 64)
# name -> (sparsity, tokens or pictures)
NETS = (("ViT-S MLP x 4", 0.9), ("conv stack", 0.9), ("wide MLP", 0.9))


def keep_blocks_(layer: nn.Module, block: tuple[int, int], density: float, seed: int = 0) -> None:
    """Zero whole blocks of a Linear's or Conv2d's weight."""
    weight = layer.weight
    mask = random_blocks(weight.shape[0], weight.shape[1], block, density, seed).to(weight.device)
    with torch.no_grad():
        weight.mul_(mask.view(*mask.shape, *[1] * (weight.dim() - 2)))


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Return the two layers of a Transformer's MLP."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def training_cases() -> Iterator[Case]:
    """Yield one training step of a ViT-S MLP at 80 % blocks: forward, backward, AdamW, mask."""
    width, hidden, tokens = VIT_S
    x = torch.randn(tokens, width, device=rows.DEVICE, dtype=DTYPE)
    want = torch.randn(tokens, width, device=rows.DEVICE, dtype=DTYPE)
    for side in (64, 32):
        dense = mlp(width, hidden).to(rows.DEVICE, DTYPE)
        for i in (0, 2):
            keep_blocks_(dense[i], (side, side), 0.2, seed=i)
        sparse = copy.deepcopy(dense)
        for i in (0, 2):
            sparse[i] = lw.nn.SparseLinear.from_dense(dense[i], "block", block=(side, side))
        ours = {"SparseLinear, blocks": _step(sparse, x, want, masked=False)}
        calls = {"nn.Linear, masked after the step": _step(dense, x, want, masked=True)}
        where = {"op": "training step", "block": side, "sparsity": 0.8, "tokens": tokens}
        name = f"MLP {width}-{hidden}-{width}, {tokens} tokens bf16, blocks {side}x{side}, 80 %"
        yield Case("training step", name, where, ours, calls, sets=2, trains=True)


def _step(net: nn.Module, x: Tensor, want: Tensor, masked: bool) -> Callable[[int], object]:
    net = net.train()
    in_graphs = rows.DEVICE == "cuda"
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True, capturable=in_graphs)
    hidden = [net[0].weight, net[2].weight] if masked else []
    masks = [w.detach() != 0 for w in hidden]

    def step(i: int) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.mse_loss(net(x), want)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in zip(hidden, masks, strict=True):
                weight.mul_(mask)
        return loss.detach()

    return step


def compress_cases() -> Iterator[Case]:
    """Yield nets after compress_ beside the dense net and torch.compile of it."""
    for name, sparsity in NETS:
        net, x = _net(name, sparsity)
        dense = copy.deepcopy(net)
        report = lw.compress_(net, x, cache=False)
        chosen = ", ".join(sorted({row.chosen for row in report.layers}))
        calls = {"dense": lambda i, dense=dense, x=x: dense(x)}
        if rows.DEVICE == "cuda":
            fast = compile_strongest(lambda dense=dense, x=x: dense(x))
            calls["torch.compile"] = lambda i, fast=fast: fast()
        where = {"op": "compress_", "net": name, "sparsity": sparsity}
        about = f"{name}, {100 * sparsity:.0f} % in blocks of {BLOCK[0]}; chosen: {chosen}"
        ours = {"compress_": lambda i, net=net, x=x: net(x)}
        yield Case("nets", about, where, ours, calls, sets=1)


def _net(name: str, sparsity: float) -> tuple[nn.Module, Tensor]:
    """Return a pruned net on the GPU in eval mode, and its input."""
    options = {"device": rows.DEVICE, "dtype": DTYPE}
    torch.manual_seed(0)
    if name == "conv stack":
        layers = [nn.Conv2d(256, 256, 3, padding=1) for _ in range(4)]
        net = nn.Sequential(*(m for conv in layers for m in (conv, nn.ReLU())))
        net = net.to(**options).to(memory_format=torch.channels_last)
        x = torch.randn(64, 256, 28, 28, **options).contiguous(memory_format=torch.channels_last)
    else:
        width, hidden, tokens = VIT_S if name.startswith("ViT-S") else (4096, 4096, 8192)
        net = nn.Sequential(*(mlp(width, hidden) for _ in range(4))).to(**options)
        x = torch.randn(tokens, width, **options)
    pruned = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for seed, layer in enumerate(pruned):
        keep_blocks_(layer, BLOCK, 1 - sparsity, seed)
    return net.eval(), x
