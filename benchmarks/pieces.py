"""Work in pieces of limited time: a call does what fits, and the next one goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.core.files import read_json_if_there, write_json
from compress.core.stage import Advance, Progress


class Pause(BaseException):
    """The time of this call is over. No `Exception`, so that nothing on the way takes it for a failure."""


class Clock:
    """How long this call may work. A file keeps what a piece of each kind takes, and what trainings have taken."""

    def __init__(self, minutes: float, file: Path):
        self.end, self.file = time.monotonic() + 60 * minutes, file
        known = read_json_if_there(file)
        self.longest: dict[str, float] = known.get("longest", {})  # kind → seconds of its last piece
        self.spent: dict[str, list[float]] = known.get("spent", {})  # training → wall and processor seconds
        self.pieces = 0  # done in this call

    def check(self, kind: str) -> None:
        """`Pause` unless one more piece of the kind fits. The first of a call always does, or nothing would advance."""
        if self.pieces and time.monotonic() + self.longest.get(kind, 0.0) > self.end:
            raise Pause

    def done(self, kind: str, seconds: float) -> None:
        """Count a piece."""
        self.pieces += 1
        self.longest[kind] = seconds
        write_json(self.file, {"longest": self.longest, "spent": self.spent})

    @contextmanager
    def piece(self, kind: str) -> Iterator[None]:
        """Work that is not interrupted once it has begun."""
        self.check(kind)
        begun = time.monotonic()
        yield
        self.done(kind, time.monotonic() - begun)


class Watched(Progress):
    """Progress that ends a call in time: behind a checkpoint of a training, or between two cuts of a search."""

    def __init__(self, shown: Progress, clock: Clock, save_every: int):
        self.shown, self.clock, self.save_every = shown, clock, save_every
        self.training = ""  # what is trained, for the clock's file

    def note(self, text: str) -> None:
        self.shown.note(text)

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        with self.shown.bar(label, total) as draw:
            watch = {"training": self._checkpoints, "search": self._cuts}.get(label)
            yield watch(draw, total or 0) if watch else draw

    def _checkpoints(self, draw: Advance, total: int) -> Advance:
        """A checkpoint is written behind every multiple of `save_every`, so the call ends at the step after it, which
        alone is lost. The first advance only says where a resumed training stands."""
        step, own, marks = 0, -1, (time.monotonic(), time.process_time())
        spent = self.clock.spent.setdefault(self.training, [0.0, 0.0])

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal step, own, marks
            draw(n, note)
            step, own = step + n, own + 1
            saved = own > 1 and (step - 1) % self.save_every == 0
            if not saved and step < total:
                return
            now = (time.monotonic(), time.process_time())
            seconds = now[0] - marks[0]
            spent[:] = [sum(times) - mark for *times, mark in zip(spent, now, marks, strict=True)]
            marks = now
            self.clock.done(self.training, seconds)
            if step < total:
                self.clock.check(self.training)

        return advance

    def _cuts(self, draw: Advance, total: int) -> Advance:
        """The search writes down every cut that it has tried."""
        begun = time.monotonic()

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal begun
            draw(n, note)
            self.clock.done("search", time.monotonic() - begun)
            begun = time.monotonic()
            self.clock.check("search")

        return advance
