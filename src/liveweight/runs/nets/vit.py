"""A small vision transformer of plain Linear layers, with token merging at one block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liveweight.nn.token_merge import TokenMerge, size_bias


class Attention(nn.Module):
    """Multi-head self-attention of two Linear layers, qkv and out.

    x [N, T, width] -> [N, T, width], and the keys' mean over the heads [N, T, width / heads], from
    which tokens are matched. Merged tokens count by size: softmax(q k / sqrt(d) + log size).
    """

    traced_inside = True  # for symbolic tracing: a module of a user's net, not one of ours

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        count, tokens, width = x.shape
        parts = self.qkv(x).reshape(count, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        bias = size_bias(size)
        bias = None if bias is None else bias.to(query.dtype)
        y = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(y.transpose(1, 2).reshape(count, tokens, width)), key.mean(1)


class Block(nn.Module):
    """Pre-norm transformer block; where `merge` is given, tokens are merged after its attention."""

    traced_inside = True

    def __init__(self, width: int, heads: int, hidden: int, merge: TokenMerge | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.merge = merge
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y, keys = self.attention(self.norm1(x), size)
        x = x + y
        if self.merge is not None:
            x, size = self.merge(x, keys, size)
        return x + self.mlp(self.norm2(x)), size


class ViT(nn.Module):
    """Vision transformer with a class token: patches, `depth` pre-norm blocks, a Linear head.

        weights = channels patch^2 width + depth (4 width^2 + 2 width hidden) + width classes

    size         side of the square images, a multiple of patch
    hidden       units of the blocks' perceptrons; default: 2 width
    merge        share of the patch tokens merged away once, in [0, 0.5]; 0: none
    merge_block  the block after whose attention they are merged, from 0

    x [N, channels, size, size] -> [N, classes]. Every weight matrix is an nn.Linear, drawn from
    Xavier's uniform; positions and the class token from normal(0, 0.02).
    Raises ValueError for sizes that do not fit. Source: Dosovitskiy et al., "An image is worth
    16x16 words", ICLR 2021; merging: Bolya et al., ICLR 2023.
    """

    def __init__(
        self,
        size: int = 28,
        channels: int = 1,
        classes: int = 10,
        patch: int = 7,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        hidden: int | None = None,
        merge: float = 0.0,
        merge_block: int = 0,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"ViT: size must be a multiple of patch, got {size} and {patch}")
        if width % heads:
            raise ValueError(f"ViT: width must be a multiple of heads, got {width} and {heads}")
        if not 0 <= merge_block < depth:
            raise ValueError(f"ViT: merge_block must be in [0, {depth - 1}], got {merge_block}")
        self.patch = patch
        self.embed = nn.Linear(channels * patch**2, width)
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + (size // patch) ** 2, width))
        merges = {merge_block: TokenMerge(ratio=merge)} if merge else {}
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden or 2 * width, merges.get(i)) for i in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.token, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(patches(x, self.patch))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        size = None
        for block in self.blocks:
            x, size = block(x, size)
        return self.head(self.norm(x[:, 0]))


def patches(x: Tensor, side: int) -> Tensor:
    """Cut images [N, C, H, W] into patches [N, H W / side^2, C side^2], row by row."""
    count, channels, height, width = x.shape
    x = x.reshape(count, channels, height // side, side, width // side, side)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * side**2)
