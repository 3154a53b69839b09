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
        raise TypeError(f"{op}: {name} must be {wanted}, got {dtype_name(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, expected {device}")
    return value


def make_pair(op: str, name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    """Return value as (height, width); raise unless it is one or two whole numbers >= least."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{op}: {name} must be a whole number or two, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{op}: {name} must be >= {least}, got {value!r}")
    return pair


def cast_like(op: str, x: Tensor, values: Tensor) -> Tensor:
    """Return x in the dtype of values where autocast allows the cast; raise TypeError otherwise.

    Dense layers do the same; callers skip it where the dtypes are one.
    """
    if x.is_floating_point() and torch.is_autocast_enabled(x.device.type):
        return x.to(values.dtype)
    raise TypeError(f"{op}: expected x {dtype_name(values)} like values, got {dtype_name(x)}")


def check_bias(op: str, bias: Tensor, size: int, values: Tensor) -> None:
    """Raise TypeError or ValueError unless bias is a tensor [size] like values."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: bias must be a tensor or None, got {type(bias).__name__}")
    if bias.dim() != 1 or bias.size(0) != size:
        raise ValueError(f"{op}: expected bias [{size}], got {tuple(bias.shape)}")
    if bias.dtype is not values.dtype:
        raise TypeError(f"{op}: expected bias {dtype_name(values)}, got {dtype_name(bias)}")
    if bias.device != values.device:
        raise ValueError(f"{op}: bias is on {bias.device}, expected {values.device} like values")


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype as error messages say it, "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


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
