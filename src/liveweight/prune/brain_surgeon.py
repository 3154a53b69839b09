"""Optimal Brain Surgeon and SparseGPT on a layer's own error; kept weights are refitted."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from liveweight.prune.importances import LayerScore, Target, importances, score_dtype
from liveweight.prune.layer_hessian import InputGram, as_rows, as_weight
from liveweight.prune.structure import Panels, by_target

_ROWS_BYTES = 256 << 20  # systems of single rows held at a time


class _Surgeon:
    """Weights scored and refitted by the Gram matrix of the layer's input.

    damp   share of the mean diagonal of H that is added to it
    """

    needs_data = True
    cost = "one forward pass, a matrix of inputs x inputs per layer and its inverse"

    def __init__(self, damp: float = 0.01) -> None:
        if not 0 < damp < float("inf"):
            raise ValueError(f"damp must be finite and > 0, got {damp}")
        self.damp = float(damp)

    def default_granularity(self, kind: str) -> str:
        return "weight"

    def observer(self, target: Target) -> InputGram:
        return InputGram(target)

    def score(self, target: Target, seen: InputGram) -> LayerScore:
        weight = target.module.weight
        rows = as_rows(weight, _groups(target))
        saliency = rows.square() / self._divisor(seen.damped(self.damp)).unsqueeze(1)
        saliency = saliency.flatten(0, 1).view_as(weight)
        return LayerScore(by_target(saliency.to(score_dtype(weight)), target))


class Obs(_Surgeon):
    """Score w_k^2 / (2 [H^-1]_kk), and refit what is kept so that the layer's output changes least.

        kept weights of a row = argmin || (w' - w)^T X ||^2 = H_SS^-1 (H w)_S,   S what is kept

    H is the damped Gram matrix of the layer's input over the data, one for all rows of a group: the
    error is the layer's own, not the loss's. The refit is exact for the final mask. Layers see the
    inputs of the model as it was.

    damp   share of the mean diagonal of H that is added to it

    Source: Hassibi, Stork, "Second order derivatives for network pruning: optimal brain surgeon",
    NeurIPS 1992; layer by layer as in Frantar, Alistarh, "Optimal brain compression", 2022.
    Raises ValueError for a damp that is not positive.
    """

    name = "obs"

    def _divisor(self, gram: Tensor) -> Tensor:
        # H = 2 gram: 2 [H^-1]_kk = [gram^-1]_kk.
        return torch.linalg.inv(gram).diagonal(dim1=1, dim2=2)

    def refit(self, target: Target, seen: InputGram, keep: Tensor) -> Tensor:
        """Return the weight that keeps `keep` (bool, shape of the weight) and fits best."""
        weight, groups = target.module.weight, _groups(target)
        rows, kept = as_rows(weight, groups), as_rows(keep, groups)
        gram = seen.damped(self.damp)
        out = torch.zeros_like(rows)
        at_once = max(1, _ROWS_BYTES // (8 * gram.shape[-1] ** 2))
        for g in range(groups):
            wanted = rows[g] @ gram[g]  # H w, H symmetric
            for start in range(0, rows.shape[1], at_once):
                part = slice(start, start + at_once)
                out[g, part] = _solve(gram[g], wanted[part], kept[g, part])
        return as_weight(out, weight)


def _solve(gram: Tensor, wanted: Tensor, kept: Tensor) -> Tensor:
    """Solve gram_SS w_S = wanted_S for every row: kept [rows, k] of 0 and 1."""
    systems = gram * (kept.unsqueeze(1) * kept.unsqueeze(2))
    systems.diagonal(dim1=1, dim2=2).add_(1 - kept)  # 1 w = 0 for what is gone
    factor = torch.linalg.cholesky(systems)
    return torch.cholesky_solve((wanted * kept).unsqueeze(2), factor).squeeze(2) * kept


class SparseGpt(_Surgeon):
    """Walk over the columns, drop what costs least in each block, let later columns make up for it.

        U = chol(H^-1), upper;  score w^2 / U_kk^2;  error e = (w - w') / U_kk;
        later columns of the row -= e U_k,later

    Masks are chosen in blocks of `width` columns from the weights as they stand by then (n:m: every
    m columns). Of a convolution, columns are the entries of a filter. Goes with sparsity per layer
    at granularity "weight", and with granularity "vnm" of pattern (1, 2, m). Layers see the inputs
    of the model as it was, where the source prunes layer after layer.

    damp    share of the mean diagonal of H that is added to it
    width   columns whose mask is chosen together

    Source: Frantar, Alistarh, "SparseGPT: massive language models can be accurately pruned in
    one-shot", ICML 2023, and its public program.
    Raises ValueError for a damp or width that is not positive and for other selection rules.
    """

    name = "sparsegpt"

    def __init__(self, damp: float = 0.01, width: int = 128) -> None:
        super().__init__(damp)
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.width = width

    def _divisor(self, gram: Tensor) -> Tensor:
        return _upper(gram).diagonal(dim1=1, dim2=2).square()

    def solve(
        self,
        target: Target,
        seen: InputGram,
        alive: Tensor,
        sparsity: float | None,
        panels: Panels | None,
    ) -> tuple[Tensor, Tensor]:
        """Return (keep, weight): a mask like `alive` (bool, the weight's shape), and new values.

        sparsity   share of the weights to remove, those gone already among them; or
        panels     a pattern (1, 2, m) along the columns
        """
        if target.granularity != "weight" or (panels is not None and panels.rows != 1):
            raise ValueError(
                f"layer '{target.name}': importance 'sparsegpt' removes single weights by sparsity "
                "per layer, or by a pattern (1, 2, m)"
            )
        weight, groups = target.module.weight, _groups(target)
        rows, live = as_rows(weight, groups), as_rows(alive, groups).bool()
        upper = _upper(seen.damped(self.damp))
        walk = replace_width(self.width, panels)
        remove = 0 if panels else alive.numel() - round((1.0 - sparsity) * alive.numel())
        kept, fitted = [], []
        for g in range(groups):
            share = round(remove * (g + 1) / groups) - round(remove * g / groups)
            mask, values = _walk(rows[g], live[g], upper[g], walk, share, panels)
            kept.append(mask)
            fitted.append(values)
        keep = torch.stack(kept).flatten(0, 1).view_as(alive)
        return keep, as_weight(torch.stack(fitted), weight)


def replace_width(width: int, panels: Panels | None) -> int:
    """Return the columns of a block: whole groups of m where there is a pattern."""
    return width if panels is None else max(1, width // panels.group) * panels.group


def _upper(gram: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)


def _walk(
    weight: Tensor,
    live: Tensor,
    upper: Tensor,
    width: int,
    remove: int,
    panels: Panels | None,
) -> tuple[Tensor, Tensor]:
    """Return (mask, values) [rows, k] of one group that lost `remove` weights, earlier ones too."""
    weight = weight * live
    k = weight.shape[1]
    keep = live.clone()
    for start in range(0, k, width):
        end = min(start + width, k)
        block = weight[:, start:end]
        saliency = block.square() / upper.diagonal()[start:end].square()
        saliency = torch.where(live[:, start:end], saliency, -1.0)
        if panels is None:
            gone = int((~keep[:, :start]).sum())
            drop = min(max(round(remove * end / k) - gone, 0), saliency.numel())
            order = saliency.flatten().argsort(stable=True)[:drop]
            mask = torch.ones_like(block, dtype=torch.bool).flatten()
            mask[order] = False
            mask = mask.view_as(block) & live[:, start:end]
        else:
            whole = replace(panels, rows=1)
            mask = whole.select(saliency.clamp_min(0), live[:, start:end])
        keep[:, start:end] = mask
        errors = torch.zeros_like(block)
        for i in range(end - start):
            column = weight[:, start + i]
            errors[:, i] = torch.where(mask[:, i], 0.0, column) / upper[start + i, start + i]
            reach = upper[start + i, start + i : end]
            weight[:, start + i : end] -= errors[:, i : i + 1] * reach
            weight[:, start + i].masked_fill_(~mask[:, i], 0)
        weight[:, end:] -= errors @ upper[start:end, end:]
    return keep, torch.where(keep, weight, 0.0)


def _groups(target: Target) -> int:
    return getattr(target.module, "groups", 1)


importances["obs"] = Obs
importances["sparsegpt"] = SparseGpt
