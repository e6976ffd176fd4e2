"""Progress display: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from ..core.stage import Advance, Progress

LOG_EVERY = 20.0  # seconds between lines of one bar without a terminal


class ConsoleProgress(Progress):
    """Draws bars on a terminal; elsewhere prints a line from time to time."""

    def __init__(self, console: Console):
        self.console = console

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        with self._drawn(label, total) if self.console.is_terminal else self._logged(label, total) as advance:
            yield advance

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def _drawn(self, label: str, total: int | None) -> Iterator[Advance]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Bars(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(label, total=total, note="")

            def advance(n: int = 1, note: str = "") -> None:
                bars.update(task, advance=n)
                if note:
                    bars.update(task, note=note)

            yield advance

    @contextmanager
    def _logged(self, label: str, total: int | None) -> Iterator[Advance]:
        state = {"done": 0, "note": ""}
        start = last = time.monotonic()

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal last
            state["done"] += n
            state["note"] = note or state["note"]
            if time.monotonic() - last >= LOG_EVERY:
                last = time.monotonic()
                of = f"/{total}" if total else ""
                self.note(f"  {label} {state['done']}{of}, {last - start:.0f} s  {state['note']}".rstrip())

        yield advance
