"""mass_mask: the smallest set of scores that holds a given share of a row's sum."""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight import _library, reference
from liveweight._check import check_fraction, check_tensor

TIES = ("stable", "authors")


def mass_mask(
    scores: Tensor, alpha: float, *, ties: str = "stable", packed: bool = False
) -> Tensor:
    """Keep, per row, the smallest set of scores that sums to >= alpha of the row's total.

        s(1) >= s(2) >= ...    p0 = min{p : s(1) + ... + s(p) >= alpha * sum(s)}

    scores   [R, n]  float32, finite and >= 0; sums are float64
    alpha    share to keep, in [0, 1]; 1 keeps exactly the scores > 0
    ties     "stable": keep s(1)..s(p0), equal scores by lower index first; alpha = 0 or a row of
             zeros keeps nothing. "authors": keep the scores above s(p0 + 1), so the first dropped
             score and its ties go, and at least one score of each row does; sums are rounded
             to float32 before they are compared, as their program's are
    packed   return bits, 32 columns a word, in the layout of pack_mask_bits
    returns  [R, n]  bool, or [R, ceil(n / 32)] int32 where packed

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, alpha or ties, and for a
    negative, NaN or infinite score (names the row; in a captured CUDA graph, where nothing may wait
    for the GPU, a device-side assertion stops the replay instead).
    Source: the threshold rule of NNrelief (arXiv 2109.10795) and, for "authors", its code.
    """
    check_tensor("mass_mask", "scores", scores, dim=2, dtypes=(torch.float32,))
    alpha = check_fraction("mass_mask: alpha", alpha)
    if ties not in TIES:
        raise ValueError(f'mass_mask: ties must be "stable" or "authors", got {ties!r}')
    return _mass_mask(scores.detach().contiguous(), alpha, ties == "authors", packed)


def _fake(scores: Tensor, alpha: float, authors_ties: bool, packed: bool = False) -> Tensor:
    return fake_mask(scores, packed)


def fake_mask(scores: Tensor, packed: bool) -> Tensor:
    """Return an empty mask of scores [R, n]: bool [R, n], or int32 [R, ceil(n / 32)]."""
    R, n = scores.shape
    if packed:
        return scores.new_empty(R, (n + 31) // 32, dtype=torch.int32)
    return scores.new_empty(R, n, dtype=torch.bool)


_library.register("mass_mask", reference.mass_mask, _fake)
_mass_mask = torch.ops.liveweight.mass_mask.default
