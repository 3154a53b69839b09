"""What a model is pruned to: so many parameters, FLOPs or seconds, or a share of the dense ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("latency", "parameters", "flops")
_UNITS = {"latency": "seconds", "parameters": "parameters", "flops": "FLOPs"}


@dataclass(frozen=True)
class Goal:
    """One target: `value` in seconds, parameters or FLOPs, or, `relative`, a share of dense."""

    kind: str
    value: float
    relative: bool

    def cost(self, dense: float, part: float = 1.0) -> float:
        """Return the cost to reach after a part of the way: dense (target / dense)^part.

        Equal parts take away the same share of what is left.
        """
        target = self.value * dense if self.relative else self.value
        return dense * (target / dense) ** part if target < dense else target

    def __str__(self) -> str:
        if self.relative:
            name = "FLOPs" if self.kind == "flops" else self.kind
            return f"{100 * self.value:g}% of the dense {name}"
        return f"{self.value:g} {_UNITS[self.kind]}"


def parse_goal(**targets: object) -> Goal:
    """Return the one target that is given among target_latency, target_parameters, target_flops.

    A target is a number above 0, or a string such as "50%" for a share of the dense model's cost.
    Raises ValueError where none or several are given or one is out of range, TypeError where one is
    neither a number nor such a string.
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        got = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
        raise ValueError(f"give one of {', '.join(targets)}, got {got}")
    name, value = next(iter(given.items()))
    kind = name.rpartition("target_")[2]
    if isinstance(value, str):
        return Goal(kind, _share(name, value), relative=True)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f'{name} must be a number or a share such as "50%", got {type(value).__name__}'
        )
    least = 1.0 if kind != "latency" else 0.0
    if not math.isfinite(value) or value <= 0 or value < least:
        hint = '; write a share of the dense model as "50%"' if 0 < value < least else ""
        raise ValueError(
            f"{name} must be {_UNITS[kind]}, {'1 or more' if least else 'above 0'}, "
            f"got {value!r}{hint}"
        )
    return Goal(kind, float(value), relative=False)


def _share(name: str, text: str) -> float:
    number, sign, rest = text.partition("%")
    try:
        share = float(number) / 100
    except ValueError:
        share = math.nan
    if not sign or rest.strip() or not 0 < share <= 1:
        raise ValueError(f'{name} must be a share above 0% and up to 100%, as "50%", got {text!r}')
    return share
