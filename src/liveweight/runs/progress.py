"""Progress of a run: bars on a terminal, one line per epoch or phase elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Reporter:
    """Says what a run is doing; quiet=True says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._bars: Progress | None = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def phase(self, title: str, epochs: int, start: int = 0) -> Iterator[None]:
        """Show one phase of training; epoch() may be used inside."""
        if not self.console.is_terminal or self.console.quiet:
            self.say(title)
            yield
            return
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=14),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as self._bars:
            self._epochs = self._bars.add_task(title, total=epochs, completed=start, note="")
            try:
                yield
            finally:
                self._bars = None

    @contextlib.contextmanager
    def epoch(self, steps: int) -> Iterator[Callable[[], None]]:
        """Show one epoch of so many steps; yields what is called after each step."""
        if self._bars is None:
            yield lambda: None
            return
        bars = self._bars
        task = bars.add_task("  steps", total=steps, note="")
        try:
            yield lambda: bars.advance(task)
        finally:
            bars.remove_task(task)

    def epoch_done(self, epoch: str, text: str) -> None:
        if self._bars is None:
            self.say(f"  epoch {epoch}: {text}")
        else:
            self._bars.update(self._epochs, advance=1, note=text)
