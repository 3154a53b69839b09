"""TokenMerge: fewer tokens for the layers that follow, by averaging those most alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenMerge(nn.Module):
    """Merges the most similar tokens of a sequence into averages: bipartite soft matching.

    Tokens 0, 2, 4, ... each look for the most similar (cosine) of tokens 1, 3, 5, ...; the `r` of
    them that are most alike are averaged with what they found:

        x'_j = sum_{i in group j} s_i x_i / s'_j        s'_j = sum_{i in group j} s_i

    with s_i the number of tokens that token i stands for already. What is left keeps its order,
    the even tokens first. Attention that follows adds log(s') to its logits (`size_bias`), so that
    a merged token weighs as much as those it replaces.

    r              tokens to merge away, or
    ratio          the share of the tokens to merge away, rounded down; at most half of them go
    protect_first  token 0 (a class token) is neither merged nor merged into

    Raises ValueError unless exactly one of r >= 0 and ratio in [0, 0.5] is given.
    Source: Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, "Token merging: your ViT but faster",
    ICLR 2023.
    """

    def __init__(
        self, r: int | None = None, *, ratio: float | None = None, protect_first: bool = True
    ) -> None:
        super().__init__()
        if (r is None) == (ratio is None):
            raise ValueError(f"TokenMerge: give either r or ratio, got r={r}, ratio={ratio}")
        if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 0):
            raise ValueError(f"TokenMerge: r must be a whole number of at least 0, got {r!r}")
        if ratio is not None and not 0 <= ratio <= 0.5:
            raise ValueError(f"TokenMerge: ratio must be in [0, 0.5], got {ratio!r}")
        self.r, self.ratio, self.protect_first = r, ratio, protect_first

    def merged(self, tokens: int) -> int:
        """Return how many of so many tokens go."""
        free = max(0, tokens - self.protect_first)
        wanted = int(self.ratio * free + 1e-9) if self.r is None else self.r
        return min(wanted, free // 2)

    def forward(
        self, x: Tensor, metric: Tensor | None = None, size: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens that are left and how many each of them stands for.

        x        [N, T, D] floating point
        metric   [N, T, K], what similarity is read from (attention keys); default: x
        size     [N, T] float32, what each token stands for; default: 1
        returns  [N, T - r, D] like x, [N, T - r] float32

        Gradients reach x through the averages; the choice itself has none. Raises ValueError for
        shapes that do not fit.
        """
        if x.dim() != 3:
            raise ValueError(f"TokenMerge: x must be [N, T, D], got {list(x.shape)}")
        count, tokens, _ = x.shape
        for name, value, rank in (("metric", metric, 3), ("size", size, 2)):
            if value is not None and (value.dim() != rank or value.shape[:2] != x.shape[:2]):
                raise ValueError(
                    f"TokenMerge: {name} must be [{count}, {tokens}{', K' * (rank == 3)}] like x, "
                    f"got {list(value.shape)}"
                )
        if size is None:
            size = x.new_ones(count, tokens, dtype=torch.float32)
        r = self.merged(tokens)
        if r == 0:
            return x, size
        places = torch.arange(tokens - r, device=x.device)[:, None]
        groups = self._places(x if metric is None else metric, r)[:, None] == places
        weights = groups * size[:, None]  # [N, T - r, T]
        size = weights.sum(2)
        return (weights / size[..., None]).to(x.dtype) @ x, size

    @torch.no_grad()
    def _places(self, metric: Tensor, r: int) -> Tensor:
        """Return [N, T] int64: where each token goes among the T - r that are left."""
        metric = nn.functional.normalize(metric.float(), dim=-1)
        even, odd = metric[:, ::2], metric[:, 1::2]
        best, partner = (even @ odd.transpose(1, 2)).max(-1)
        if self.protect_first:
            best[:, 0] = -torch.inf
        chosen = best.argsort(dim=1, descending=True, stable=True)[:, :r]
        goes = torch.zeros_like(best, dtype=torch.bool).scatter(1, chosen, True)
        left = even.shape[1] - r
        places = partner.new_empty(metric.shape[:2])
        places[:, ::2] = torch.where(goes, left + partner, (~goes).cumsum(1) - 1)
        places[:, 1::2] = left + torch.arange(odd.shape[1], device=places.device)
        return places

    def extra_repr(self) -> str:
        """How much goes."""
        how = f"r={self.r}" if self.ratio is None else f"ratio={self.ratio}"
        return f"{how}, protect_first={self.protect_first}"


def size_bias(size: Tensor | None) -> Tensor | None:
    """Return log(size) [N, 1, 1, T] to add to attention logits [N, heads, T, T]; None for None."""
    return None if size is None else size.log()[:, None, None]
