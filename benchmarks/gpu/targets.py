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
    call: str | tuple[str, ...]
    floor: float
    goal: float | None = None
    against: tuple[str, ...] | str | None = None


MANY, FEW = (8192, 64 * 197), (1, 16)
# Of activity_stats_: what takes long enough for its two launches not to count.
LARGE_ACTIVITY = ([8192, 4096, 1], [256, 512, 784], [256, 64, 3136])
SPARSITIES = (0.5, 0.75, 0.9, 0.95)


def _ladder(
    case: str,
    where: dict,
    call: str | tuple[str, ...],
    floors: tuple,
    goals: tuple = (None,) * 4,
    sparsities: tuple = SPARSITIES,
) -> Iterator[Target]:
    """Yield a target per sparsity; None leaves one out."""
    for sparsity, floor, goal in zip(sparsities, floors, goals, strict=True):
        if floor is not None:
            about = {**where, "sparsity": sparsity}
            yield Target(f"{case}, {100 * sparsity:.0f} %", about, call, floor, goal)


def _all() -> Iterator[Target]:
    yield from _blocks()
    yield from _scores()
    yield from _single_weights()


def _blocks() -> Iterator[Target]:
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
    yield from _ladder(case, where, "block_linear", (1.7, 2.8, 4.5, 6.0))
    where = {"op": "block_conv2d", "channels": (256, 512), "block": "128x32"}
    case = "3x3 convolution, panels of 128, 256 channels and more"
    yield from _ladder(case, where, "block_conv2d", (1.4, 2.6, 4.5, 7.0))
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


def _scores() -> Iterator[Target]:
    # A copy moves every byte twice: at its bandwidth, reading once takes half its time.
    where = {"op": "activity_stats_", "shape": LARGE_ACTIVITY}
    case = "activity_stats_ in shares of the copy's bandwidth, times 2"
    yield Target(case, where, "activity_stats_", 2 * 0.85, 2 * 0.93, ("copy",))
    case = "activity_stats_ against the same in eager PyTorch"
    yield Target(case, where, "activity_stats_", 4.0, None, ("eager all four",))
    case = "scores of convolutions against a grouped convolution per filter"
    yield Target(case, {"op": "conv scores"}, "fused", 100.0)
    where = {"op": "mass_mask", "shape": [4096, 14336]}
    yield Target("mass_mask [4096, 14336] against a sort", where, "mass_mask", 10.0)


def _single_weights() -> Iterator[Target]:
    calls = ("bitmap_linear", "delta_linear")
    levels = (0.5, 0.7, 0.9, 0.95)
    where = {"op": "unstructured_linear", "tokens": 1, "dense_mb": 117}
    case, goals = "single weights, 1 token, 117 MB dense", (1.5, 2.2, 4.5, 7.0)
    yield from _ladder(case, where, calls, (1.3, 1.8, 3.5, 5.0), goals, levels)
    where = {"op": "unstructured_linear", "tokens": 1, "shape": [4096, 4096]}
    case = "single weights, 1 token, 4096x4096"
    yield from _ladder(case, where, calls, (1.15, 1.5, 2.3, 2.7), sparsities=levels)
    where = {"op": "unstructured_linear", "tokens": 16, "dense_mb": 117}
    case = "single weights, 16 tokens, 117 MB dense"
    yield from _ladder(case, where, calls, (1.25, 1.6, 2.5, 3.0), sparsities=levels)
    case = "single weights against torch's CSR (cuSPARSE)"
    yield Target(case, {"op": "unstructured_linear"}, calls, 3.0, None, "sparse")
    where = {"op": "semi_structured", "tokens": MANY}
    yield Target("2:4, many tokens", where, "nm_linear", 1.25, 1.5)
    where = {"op": "semi_structured", "tokens": FEW}
    yield Target("2:4, 1 and 16 tokens", where, "nm_linear", 1.4, 1.65)
    where = {"op": "kernelwise_conv2d", "dtype": "fp32"}
    case = "kernels of a convolution, strict fp32"
    levels, floors = (0.75, 0.9), (2.2, 4.5)
    yield from _ladder(case, where, "kernelwise_conv2d", floors, (None,) * 2, levels)


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
