"""Reports of scoring and pruning: plain values, a table, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from torch import Tensor


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> str:
    """Return aligned columns, the first `left` of them to the left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    out = []
    for line in lines:
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
    out.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(out)


@dataclass
class LayerRow:
    """One layer: weights and biases before and after; dead_units = units with nothing left.

    kept_mass   under a structure, the share of the sum of this call's scores that is kept
    best_mass   the share that the same number of largest scores holds, wherever they stand
    """

    name: str
    kind: str
    granularity: str
    total: int
    kept: int
    bias_total: int = 0
    bias_kept: int = 0
    dead_units: int = 0
    note: str = ""
    kept_mass: float | None = None
    best_mass: float | None = None

    @property
    def density(self) -> float:
        return self.kept / self.total if self.total else 1.0


@dataclass
class PruneReport:
    """What prune_ kept: totals count weights and biases of Linear and Conv2d, not BatchNorm.

    layers        one LayerRow per Linear and Conv2d, also of those left alone
    density       kept / total; compression = total / kept
    """

    importance: str
    rule: str
    layers: list[LayerRow]
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False

    @property
    def total(self) -> int:
        return sum(r.total + r.bias_total for r in self.layers)

    @property
    def kept(self) -> int:
        return sum(r.kept + r.bias_kept for r in self.layers)

    @property
    def density(self) -> float:
        return self.kept / self.total if self.total else 1.0

    @property
    def compression(self) -> float:
        return self.total / self.kept if self.kept else float("inf")

    def table(self) -> str:
        """Return one line per layer and a last line for all.

        Where masks have a structure: `mass`, the share of the scores' sum that is kept, and `best`,
        what as many largest scores hold.
        """
        header = ["layer", "kind", "by", "weights", "kept", "density", "biases", "dead units"]
        rows = [
            [
                r.name, r.kind, r.granularity, f"{r.total:,}", f"{r.kept:,}", f"{r.density:.2%}",
                f"{r.bias_kept:,}/{r.bias_total:,}", f"{r.dead_units:,}",
            ]
            for r in self.layers
        ]  # fmt: skip
        weights, kept = sum(r.total for r in self.layers), sum(r.kept for r in self.layers)
        biases = sum(r.bias_total for r in self.layers)
        biases_kept = sum(r.bias_kept for r in self.layers)
        rows.append(
            [
                "all", "", "", f"{weights:,}", f"{kept:,}",
                f"{kept / weights if weights else 1.0:.2%}", f"{biases_kept:,}/{biases:,}",
                f"{sum(r.dead_units for r in self.layers):,}",
            ]
        )  # fmt: skip
        if any(r.kept_mass is not None for r in self.layers):
            header += ["mass", "best"]
            for row, r in zip(rows, self.layers, strict=False):
                masses = (r.kept_mass, r.best_mass)
                row += ["-" if mass is None else f"{mass:.2%}" for mass in masses]
            rows[-1] += ["", ""]
        for row, note in zip(rows, [*(r.note for r in self.layers), ""], strict=True):
            row.append(note)
        return format_table([*header, "note"], rows, left=3)

    def to_json(self) -> str:
        """Return the report as a JSON object."""
        layers = [asdict(r) | {"density": r.density} for r in self.layers]
        return json.dumps(
            {
                "importance": self.importance,
                "rule": self.rule,
                "dry_run": self.dry_run,
                "total": self.total,
                "kept": self.kept,
                "density": self.density,
                # JSON has no infinity.
                "compression": self.compression if self.kept else None,
                "layers": layers,
                "notes": self.notes,
            },
            indent=2,
        )

    def __str__(self) -> str:
        head = f"{self.importance}, {self.rule}" + (" (dry run)" if self.dry_run else "")
        tail = (
            f"{self.kept:,} of {self.total:,} weights and biases kept, {self.compression:.2f}x less"
        )
        return "\n".join([head, self.table(), tail, *(f"note: {n}" for n in self.notes)])


class Scores(dict[str, Tensor]):
    """Scores by layer name, relative to each unit's total where the importance says so.

    bias           scores of the biases that compete with the connections, by layer name
    granularity    "weight" or "kernel", by layer name
    kinds          "linear" or "conv", by layer name
    notes          what was left alone, and why
    """

    def __init__(self) -> None:
        super().__init__()
        self.importance = ""
        self.bias: dict[str, Tensor] = {}
        self.granularity: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.notes: list[str] = []

    def table(self) -> str:
        """Return one line per layer; `top 10%` is the share of the mass in the largest tenth."""
        header = ("layer", "kind", "by", "scores", "min", "mean", "max", "zero", "top 10%")
        rows = []
        for name, scores in self.items():
            flat = scores.flatten()
            total = float(flat.sum())
            top = float(flat.topk(max(1, flat.numel() // 10)).values.sum())
            rows.append(
                (
                    name, self.kinds[name], self.granularity[name], f"{flat.numel():,}",
                    f"{flat.min():.3g}", f"{flat.mean():.3g}", f"{flat.max():.3g}",
                    f"{flat.eq(0).double().mean():.1%}", f"{top / total if total else 0.0:.1%}",
                )
            )  # fmt: skip
        return format_table(header, rows, left=3)

    def __str__(self) -> str:
        return "\n".join([self.importance, self.table(), *(f"note: {n}" for n in self.notes)])

    __repr__ = __str__
