"""top_k_mask: the k largest scores, of each row or of all together."""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight import _library, reference
from liveweight._check import check_tensor
from liveweight.ops.mass_mask import fake_mask

_OP = "top_k_mask"
_SCOPES = ("row", "global")


def top_k_mask(
    scores: Tensor,
    k: int,
    *,
    scope: str = "row",
    sizes: Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    """Keep the k largest scores of each row, or of all rows together; equal ones by lower index.

        sizes given:  s(1) >= s(2) >= ...    p = max{p : size(1) + ... + size(p) <= k}

    scores   [R, n]  float32, with scope "global" also float64; any number but NaN
    k        >= 0; all are kept where there are no more
    scope    "row" or "global" (lower index: of the flattened scores)
    sizes    [R, n]  int64, with scope "global": what each score counts, instead of 1; a score with
             a size <= 0 is never kept
    packed   return bits, 32 columns a word, in the layout of pack_mask_bits
    returns  [R, n]  bool, or [R, ceil(n / 32)] int32 where packed

    On CUDA by counting, not sorting. Raises TypeError (types, dtypes) and ValueError (shapes,
    devices, k, scope; NaN: names the row, in a captured CUDA graph a device-side assertion).
    """
    if scope not in _SCOPES:
        raise ValueError(f"{_OP}: scope must be one of {_SCOPES}, got {scope!r}")
    dtypes = (torch.float32,) if scope == "row" else (torch.float32, torch.float64)
    check_tensor(_OP, "scores", scores, dim=2, dtypes=dtypes)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{_OP}: k must be a whole number, got {type(k).__name__}")
    if k < 0:
        raise ValueError(f"{_OP}: k must be >= 0, got {k}")
    if sizes is not None:
        if scope == "row":
            raise ValueError(f'{_OP}: sizes go with scope="global"')
        check_tensor(_OP, "sizes", sizes, dtypes=(torch.int64,), device=scores.device)
        if sizes.shape != scores.shape:
            wanted, got = tuple(scores.shape), tuple(sizes.shape)
            raise ValueError(f"{_OP}: expected sizes {wanted} like scores, got {got}")
        sizes = sizes.contiguous()
    return _op(scores.detach().contiguous(), k, scope == "row", sizes, packed)


def _fake(scores: Tensor, k: int, per_row: bool, sizes: Tensor | None, packed: bool) -> Tensor:
    return fake_mask(scores, packed)


_library.register(_OP, reference.top_k_mask, _fake)
_op = torch.ops.liveweight.top_k_mask.default
