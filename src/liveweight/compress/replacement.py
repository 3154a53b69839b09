"""One layer's choice, as a change of the model that can be made and taken back."""

from __future__ import annotations

from torch import nn

from liveweight.compress import edit
from liveweight.compress.candidates import Candidate
from liveweight.compress.report import ChoiceRow


class Replacement:
    """One layer's choice, which can be put in place and taken back.

    rows  samples of a convolution's input, rows of a Linear's, at the largest batch size
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        winner: Candidate,
        row: ChoiceRow,
        saved_us: float,
        rows: int,
    ) -> None:
        self.model = model
        self.name = name
        self.row = row
        self.winner = winner
        self.saved_us = saved_us
        self.rows = rows
        self.base: Replacement | None = None
        dense = model.get_submodule(name)
        if hasattr(dense, "shrunk_from"):
            winner.module.shrunk_from = dict(dense.shrunk_from)
        self.old = {n: model.get_submodule(n) for n in (name, *winner.absorbed)}
        self.new: dict[str, nn.Module] = {name: winner.module}
        for part in winner.absorbed:
            self.new[part] = nn.Identity().train(self.old[part].training)

    def apply(self) -> None:
        """Put the sparse module and the identities in place."""
        for name, module in self.new.items():
            edit.replace_module_(self.model, name, module)

    def undo(self) -> None:
        """Put the dense modules back."""
        for name, module in self.old.items():
            edit.replace_module_(self.model, name, module)

    def follow(self, base: Replacement) -> None:
        """Take the place of another choice for the same modules, which undo brings back."""
        self.base, self.old = base, dict(base.new)

    def take(self, reason: str) -> None:
        """Put the new module in place although it did not win alone, and say why."""
        self.apply()
        row, absorbed = self.row, self.winner.absorbed
        row.chosen, row.parts = self.winner.format, (self.name, *absorbed) if absorbed else ()
        times = row.candidates
        if times.get("dense") and times.get(self.winner.label):
            row.speedup = times["dense"] / times[self.winner.label]
        row.reason = f"{reason} ({row.reason})"

    def give_up(self, reason: str) -> None:
        """Put the dense modules back for good, and say why."""
        self.undo()
        self.row.chosen, self.row.speedup, self.row.parts = "dense", 1.0, ()
        self.row.by_batch = {}
        self.row.reason = f"{reason} ({self.row.reason})"
