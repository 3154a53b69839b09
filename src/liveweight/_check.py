"""Argument checks that raise ValueError or TypeError and say what came and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor


def check_tensor(
    op: str,
    name: str,
    value: object,
    *,
    dim: int | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return value if it is a tensor of the wanted rank, dtype and device; raise otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if dim is not None and value.dim() != dim:
        raise ValueError(f"{op}: {name} must have {dim} dimensions, got shape {tuple(value.shape)}")
    if dtypes is not None and value.dtype not in (allowed := tuple(dtypes)):
        wanted = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be {wanted}, got {got}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, expected {device}")
    return value


def check_fraction(name: str, value: object) -> float:
    """Return value as a float in [0, 1]; raise otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1], got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def near_misses(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a phrase that lists the known names closest to name, for error messages."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.4) or known[:count]
    return "did you mean " + ", ".join(repr(c) for c in close) + "?" if close else "there are none"
