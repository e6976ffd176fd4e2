"""What was measured, written down at once: a fit that was killed goes on from there, and its time counts on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..prune.study import read_ledger


class Ledger:
    """Values that JSON can hold, by name, each with the seconds that it took."""

    def __init__(self, file: Path):
        self.file = file
        self._known: dict[str, Any] = read_ledger(file)
        self._used: set[str] = set()

    @property
    def spent(self) -> float:
        """Seconds of all work that was asked for by now, whenever it was done."""
        return sum(entry["seconds"] for key, entry in self._known.items() if key in self._used)

    def has(self, key: str) -> bool:
        """Whether this was found before."""
        return key in self._known

    def seconds(self, key: str) -> float:
        """What finding it took."""
        return self._known[key]["seconds"]

    def last(self, kind: str) -> float:
        """Seconds that the last finding took whose key begins so; 0 before there was one."""
        found = [self.seconds(key) for key in self._known if key in self._used and key.startswith(kind)]
        return found[-1] if found else 0.0

    def recorded(self, key: str, compute: Callable[[], Any]) -> Any:
        """What `compute` gave the first time that `key` was asked for, in this process or an earlier one."""
        if key not in self._known:
            started = time.monotonic()
            value = compute()
            entry = {"value": value, "seconds": round(time.monotonic() - started, 3)}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, entry]) + "\n")
            self._known[key] = entry
        self._used.add(key)
        return self._known[key]["value"]


class Clock:
    """The time that a fit may take, split over its parts. What was spent counts, whichever process spent it."""

    def __init__(self, ledger: Ledger, seconds: float):
        self.ledger, self.total = ledger, seconds

    def allows(self, share: float, needed: float = 0.0) -> bool:
        """Whether work of `needed` seconds ends while less than this share of all the time is spent."""
        return self.ledger.spent + needed <= share * self.total
