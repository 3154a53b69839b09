"""What the GPU kernels should reach, as data, and how each figure is read from the rows.

A target names rows by what they measure; of several rows the worst counts. A figure at or above
the floor is reached; below it is missed, and shown so; without rows it is not measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from cpu.targets import Verdict


@dataclasses.dataclass(frozen=True)
class Target:
    """A floor, and a goal where there is one, for the times of one call over those of another.

    where    what rows must be: a value, or a tuple of those allowed
    call     how the names of our calls start; of the calls of one case the fastest counts
    against  names of the calls compared with; None: the fastest dense one; "sparse": the fastest
             one of another sparse library
    """

    case: str
    where: dict[str, object]
    call: str
    floor: float
    goal: float | None = None
    against: tuple[str, ...] | str | None = None


MANY, FEW = (8192, 64 * 197), (1, 16)
SPARSITIES = (0.5, 0.75, 0.9, 0.95)


def _ladder(case: str, where: dict, call: str, floors: tuple, goals: tuple) -> Iterator[Target]:
    """Yield a target per sparsity; None leaves one out."""
    for sparsity, floor, goal in zip(SPARSITIES, floors, goals, strict=True):
        if floor is not None:
            about = {**where, "sparsity": sparsity}
            yield Target(f"{case}, {100 * sparsity:.0f} %", about, call, floor, goal)


def _all() -> Iterator[Target]:
    none = (None,) * 4
    for side, floors, goals in (
        ("64x64", (1.5, 2.8, 6.0, 8.0), (1.7, 3.3, 7.5, 11.0)),
        ("32x32", (1.0, 1.9, 4.0, 6.0), none),
        ("16x16", (None, 1.2, 2.5, 4.0), none),
    ):
        where = {"op": "block_linear", "block": side, "tokens": MANY}
        case = f"blocks {side}, many tokens"
        yield from _ladder(case, where, "block_linear", floors, goals)
    where = {"op": "block_linear", "tokens": FEW, "block": ("64x64", "32x32", "16x16")}
    case = "blocks, 1 and 16 tokens, 117 MB dense"
    yield from _ladder(case, where, "block_linear", (1.7, 2.8, 4.5, 6.0), none)
    where = {"op": "block_conv2d", "channels": (256, 512), "block": "128x32"}
    case = "3x3 convolution, panels of 128, 256 channels and more"
    yield from _ladder(case, where, "block_conv2d", (1.4, 2.6, 4.5, 7.0), none)
    plain = ("cuBLAS, dense weight", "cuBLAS, zeros in weight")
    where = {"op": "masked_linear", "mask": "random 1.0"}
    case = "masked_linear, all kept, against cuBLAS"
    yield Target(case, where, "masked_linear", 0.95, None, plain)
    made = ("cuBLAS, weight * mask", "F.linear(x, weight * mask)")
    case = "masked_linear against weight * mask in the call"
    yield Target(case, {"op": "masked_linear"}, "masked_linear", 1.0, None, made)
    case = "training step of a ViT-S MLP, 80 % blocks of 64x64"
    yield Target(case, {"op": "training step", "block": 64}, "SparseLinear", 2.0)
    yield Target("compress_ on every net", {"op": "compress_"}, "compress_", 0.98)
    case = "block_linear against torch's own BSR kernels"
    yield Target(case, {"op": "block_linear"}, "block_linear", 1.0, None, "sparse")


TARGETS = tuple(_all())


def judge(rows: Iterable[dict], targets: Iterable[Target] = TARGETS) -> list[Verdict]:
    """Return the verdict on every target, in their order."""
    cases: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        cases.setdefault((row["group"], row["case"]), []).append(row)
    return [_judge(target, cases) for target in targets]


def _judge(target: Target, cases: dict[tuple[str, str], list[dict]]) -> Verdict:
    found: list[tuple[float, str]] = []
    for (_, name), rows in cases.items():
        if not all(_fits(rows[0]["where"].get(k), v) for k, v in target.where.items()):
            continue
        mine = [r for r in rows if r["kind"] == "ours" and r["call"].startswith(target.call)]
        ours = [r["median_us"] for r in mine]
        others = [r["median_us"] for r in rows if _is_rival(target, r)]
        if ours and others:
            found.append((min(others) / min(ours), name))
    if not found:
        return Verdict(target, None, 0)
    worst = min(found)
    return Verdict(target, worst[0], len(found), worst[1])


def _fits(value: object, wanted: object) -> bool:
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def _is_rival(target: Target, row: dict) -> bool:
    if target.against is None:
        return row["kind"] == "dense"
    if target.against == "sparse":
        return row["kind"] == "sparse"
    return row["call"] in target.against
