"""The report of cluster_: what every layer keeps in blocks before and after."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from torch import Tensor

from liveweight.prune.report import format_table


@dataclass
class ClusterRow:
    """One layer: shares of the sum of its scores at the sparsity that was asked for.

    before, after   kept by whole blocks, in the old and in the new order
    best            held by as many largest scores, wherever they stand
    units, inputs   "reordered", or why its outputs and inputs are as they were
    """

    name: str
    kind: str
    block: str
    before: float
    after: float
    best: float
    units: str = ""
    inputs: str = ""


@dataclass
class ClusterReport:
    """What cluster_ did.

    layers   one ClusterRow per layer that was scored
    orders   layer name -> int64 [units]: unit i was unit orders[name][i] before; layers whose units
             stayed are left out
    """

    importance: str
    sparsity: float
    layers: list[ClusterRow]
    orders: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False

    def table(self) -> str:
        """Return one line per layer."""
        header = ("layer", "kind", "by", "before", "after", "best", "units", "inputs")
        rows = [
            (
                r.name, r.kind, r.block, f"{r.before:.2%}", f"{r.after:.2%}", f"{r.best:.2%}",
                r.units, r.inputs,
            )
            for r in self.layers
        ]  # fmt: skip
        return format_table(header, rows, left=3)

    def to_json(self) -> str:
        """Return the report as a JSON object; orders as lists."""
        return json.dumps(
            {
                "importance": self.importance,
                "sparsity": self.sparsity,
                "dry_run": self.dry_run,
                "layers": [asdict(r) for r in self.layers],
                "orders": {name: order.tolist() for name, order in self.orders.items()},
                "notes": self.notes,
            },
            indent=2,
        )

    def __str__(self) -> str:
        head = f"{self.importance}, kept mass at sparsity {self.sparsity:g}"
        head += " (dry run)" if self.dry_run else ""
        return "\n".join([head, self.table(), *(f"note: {n}" for n in self.notes)])
