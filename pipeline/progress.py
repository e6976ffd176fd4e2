"""Passes progress to a user's function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..core.stage import Advance, Progress


@dataclass(frozen=True)
class ProgressEvent:
    """An advance of a task, or a line of text."""

    label: str  # the task; empty for a line of text
    done: int = 0  # steps, of `total`
    total: int | None = None  # None: unknown
    note: str = ""  # a figure such as a loss, or the line


class CallbackProgress(Progress):
    """A `Progress` that calls a function with every event."""

    def __init__(self, call: Callable[[ProgressEvent], None]):
        self.call = call

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        done = 0

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done
            done += n
            self.call(ProgressEvent(label, done, total, note))

        yield advance

    def note(self, text: str) -> None:
        self.call(ProgressEvent("", note=text))


OnProgress = Progress | Callable[[ProgressEvent], None] | None


def as_progress(given: OnProgress) -> Progress:
    """The `Progress` for a caller's function; a silent one for None."""
    if isinstance(given, Progress):
        return given
    return Progress() if given is None else CallbackProgress(given)
