"""What the kernels should reach, as data, and how each figure is read from the tables.

Every target names rows of one table and a column. Of several rows the worst counts, unless it says
"mean" (geometric). A figure above or at the floor is reached; below it is missed, and shown so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from cpu.timing import geometric_mean

Tables = Mapping[str, list[dict]]


@dataclasses.dataclass(frozen=True)
class Target:
    """A floor (and a goal, where there is one) for a column of the rows that `where` selects."""

    case: str
    table: str
    where: dict[str, object]
    column: str
    floor: float
    goal: float | None = None
    how: str = "worst"  # or "mean"
    unit: str = "x"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A target, of a kind with floor and goal, beside what was measured.

    rows   how many rows or cases were found, worst: the one that decided
    """

    target: Any
    measured: float | None
    rows: int
    worst: str = ""

    @property
    def words(self) -> str:
        """Return "goal", "floor", "missed" or "not measured"."""
        if self.measured is None:
            return "not measured"
        if self.measured < self.target.floor:
            return "missed"
        goal = self.target.goal
        return "goal" if goal is not None and self.measured >= goal else "floor"


Pair = tuple[float, float | None]


def _group(case: str, table: str, where: dict, floors: Mapping[str, Pair | float], how="worst"):
    """Yield one target per column; a bare number is a floor without a goal."""
    for column, value in floors.items():
        floor, goal = value if isinstance(value, tuple) else (value, None)
        yield Target(case, table, where, column, floor, goal, how)


def _linear() -> Iterator[Target]:
    square, small, lenet = "4096x4096", "1024x1024", "300x784"
    for batch, torch_call, dense, sparse in (
        (8, (8.0, 14.0), (4.4, 7.0), (2.5, 5.0)),
        (32, (7.0, 12.0), (3.7, 7.0), (2.5, 5.0)),
        (128, (5.5, 10.0), (4.0, 7.0), (3.0, 5.0)),
    ):
        where = {"shape": square, "sparsity": 0.9, "batch": batch}
        floors = {"torch": torch_call, "dense": dense, "sparse": sparse}
        yield from _group(f"unstructured 90 %, {square}, batch {batch}", "linear", where, floors)
    for shape, pair, sparse in ((square, (4.0, 7.0), 1.7), (small, (1.6, 3.0), 1.2)):
        where = {"shape": shape, "sparsity": 0.9, "batch": 1}
        floors = {"torch": pair, "dense": pair, "sparse": (sparse, 3.0)}
        yield from _group(f"unstructured 90 %, {shape}, batch 1", "linear", where, floors)
    for sparsity, torch_call, dense, sparse in (
        (0.5, (1.3, 2.2), (1.0, 1.3), 2.0),
        (0.7, (1.9, 4.0), (1.3, 2.4), 2.6),
        (0.95, (12.0, 22.0), (6.0, 11.0), 2.5),
    ):
        where = {"shape": square, "sparsity": sparsity, "batch": 32}
        floors = {"torch": torch_call, "dense": dense, "sparse": sparse}
        case = f"unstructured {sparsity:.0%}, {square}, batch 32".replace("%,", " %,")
        yield from _group(case, "linear", where, floors)
    where = {"shape": (lenet, small), "sparsity": 0.9, "batch": (32, 128, 512)}
    floors = {"torch": (4.5, 9.0), "dense": (3.5, 6.5), "sparse": 2.5}
    yield from _group(
        f"unstructured 90 %, {lenet} and {small}, batch >= 32", "linear", where, floors
    )
    where = {"sparsity": 0.9, "batch": (32, 128, 512)}
    case = "share of the FMA peak, unstructured 90 %, batch >= 32"
    yield Target(case, "linear", where, "peak", 45, 75, unit="%")


def _dlmc() -> Iterator[Target]:
    for sparsity, torch_call, dense in ((0.8, 2.5, 2.0), (0.9, 4.5, 3.5), (0.95, 8.0, 6.0)):
        case = f"DLMC at {100 * sparsity:.0f} %, batch 64, geometric mean"
        floors = {"torch": torch_call, "dense": dense, "sparse": 2.5}
        yield from _group(case, "dlmc", {"sparsity": sparsity}, floors, "mean")


def _blocks() -> Iterator[Target]:
    for sparsity, torch_call, dense in (
        (0.5, (2.5, 3.5), (1.3, 1.9)),
        (0.9, (10.0, 14.0), (5.5, 8.0)),
        (0.95, (15.0, 22.0), (8.0, 12.0)),
    ):
        where = {"block": "16x16", "sparsity": sparsity, "batch": 32}
        case = f"blocks 16x16 {100 * sparsity:.0f} %, 4096x4096, batch 32, cold"
        floors = {"torch": torch_call, "dense": dense, "sparse": 3.4}
        yield from _group(case, "linear_cold", where, floors)


def _convs() -> Iterator[Target]:
    kernels = {
        1: ((0.7, (2.2, 4.0), (2.1, 3.3)), (0.9, (5.5, 11.0), (5.0, 9.0)),
            (0.95, (10.0, 20.0), (9.0, 16.0))),
        32: ((0.7, (1.8, 2.7), 1.7), (0.9, (4.5, 7.5), 4.0), (0.95, (7.5, 13.0), 7.0)),
    }  # fmt: skip
    for batch, cases in kernels.items():
        for sparsity, torch_call, dense in cases:
            case = f"3x3 conv, kernels removed {100 * sparsity:.0f} %, batch {batch}"
            floors = {"torch": torch_call, "dense": dense, "sparse": 4.0 if batch == 1 else 5.0}
            where = {"sparsity": sparsity, "batch": batch}
            yield from _group(case, "conv_kernelwise", where, floors)
    for batch in (1, 32):
        where = {"sparsity": 0.9, "batch": batch}
        floors = {"torch": (3.5, 6.5), "dense": (3.0, 6.0), "sparse": 4.0}
        case = f"3x3 conv, unstructured 90 %, batch {batch}"
        yield from _group(case, "conv_unstructured", where, floors)
    for batches, torch_call, dense in (
        ((1, 8), (4.5, 7.0), (4.5, 6.5)),
        (32, (3.4, 6.0), (2.8, 4.5)),
    ):
        name = "<= 8" if batches != 32 else "32"
        floors = {"torch": torch_call, "dense": dense, "sparse": 2.5}
        where = {"sparsity": 0.9, "batch": batches}
        yield from _group(f"1x1 conv 90 %, batch {name}", "pointwise", where, floors)


def _nets() -> Iterator[Target]:
    one = {"sparsity": 0.9, "threads": 1}
    for net, granularity, batch, dense in (
        ("VGG-like", "kernel", 1, (3.0, 5.0)),
        ("VGG-like", "kernel", 32, (6.0, 8.0)),
        ("VGG-like", "weight", 1, (2.5, 4.0)),
        ("VGG-like", "weight", 32, (5.0, 7.5)),
        ("encoder", "weight", 1, (3.0, 4.3)),
        ("encoder", "weight", 16, (4.0, 5.5)),
        ("ResNet-20", "kernel", 1, (2.0, None)),
        ("ResNet-20", "kernel", 32, (4.0, None)),
    ):
        what = "kernels" if granularity == "kernel" else "unstructured"
        where = {**one, "net": net, "granularity": granularity, "batch": batch}
        yield from _group(f"{net} 90 % {what}, batch {batch}", "nets", where, {"dense": dense})
    for net, granularity, batch, pair in (
        ("VGG-like", "kernel", 1, (2.2, 3.7)),
        ("VGG-like", "kernel", 32, (1.0, 1.25)),
    ):
        where = {"net": net, "granularity": granularity, "batch": batch, "sparsity": 0.9}
        case = f"{net} 90 % kernels, batch {batch}, against DeepSparse"
        yield from _group(case, "peers", where | {"threads": 1}, {"deepsparse": pair})
    where = {"layer": "256@8x8", "granularity": "weight", "batch": 32, "sparsity": 0.9}
    case = "3x3 conv 256@8x8, unstructured 90 %, batch 32, against DeepSparse"
    yield from _group(case, "peers", where | {"threads": 1}, {"deepsparse": (0.8, 1.2)})
    # A net that is left as it was differs from itself by noise alone.
    case = "compress_ on every net that it changed: against the best dense"
    yield from _group(case, "nets_changed", {}, {"dense": 0.98})
    large = {"net": ("VGG-like", "ResNet-20", "encoder")}
    yield from _group(
        "two cores against one, largest batch", "nets_scaling", large, {"two_cores": 1.6}
    )


WIDE = {"net": "4096-4096-4096-10", "sparsity": 0.9}


def all_targets() -> list[Target]:
    """Return every target, in the order of the page."""
    rest = [
        Target(
            "training step, 90 % mask, 4096-wide MLP, batch 128", "training", WIDE, "torch", 2, 5
        ),
        Target("bytes per weight within 6 d + 5 %", "memory", {}, "room", 1.0),
    ]
    return [*_linear(), *_dlmc(), *_blocks(), *_convs(), *rest, *_nets()]


def selected(rows: list[dict], where: Mapping[str, object]) -> list[dict]:
    """Return the rows whose labels have these values (a tuple: one of them)."""

    def fits(row: dict) -> bool:
        return all(
            row.get(key) in (value if isinstance(value, tuple) else (value,))
            for key, value in where.items()
        )

    return [row for row in rows if fits(row)]


def judge(target: Target, tables: Tables) -> Verdict:
    """Read a target's figure from the tables."""
    rows = selected(tables.get(target.table, []), target.where)
    rows = [row for row in rows if row.get(target.column) is not None]
    if not rows:
        return Verdict(target, None, 0)
    scale = 100 if target.unit == "%" else 1
    if target.how == "mean":
        mean = geometric_mean(row[target.column] for row in rows)
        return Verdict(target, scale * mean, len(rows))
    worst = min(rows, key=lambda row: row[target.column])
    return Verdict(target, scale * worst[target.column], len(rows), name_of(worst))


LABELS = ("net", "layer", "matrix", "format", "shape", "granularity", "sparsity", "batch")


def name_of(row: dict) -> str:
    """Return a row's labels in words."""
    words = [f"{key} {row[key]}" if key in ("batch", "sparsity") else str(row[key])
             for key in LABELS if row.get(key) is not None]  # fmt: skip
    return ", ".join(words)


def derived(tables: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Return the tables with the columns and rows that are worked out of others."""
    out = dict(tables)
    memory = [{**row, "room": row["limit"] / row["bytes"]} for row in tables.get("memory", [])]
    nets = tables.get("nets", [])
    scaling = [row for row in nets if "two_cores" in row]
    changed = [row for row in nets if row.get("changed")]
    return out | {"memory": memory, "nets_scaling": scaling, "nets_changed": changed}
