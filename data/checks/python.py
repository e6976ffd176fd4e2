"""The row's Python tests pass after the answer's code."""

from __future__ import annotations

from typing import ClassVar, Literal

from . import Check, Column, Truth


class Python(Check):
    """The tests in the row's column `tests` pass after the answer's code (data/sandbox.py)."""

    kind: Literal["python"] = "python"
    needs: ClassVar[frozenset[Column]] = frozenset(["tests"])

    def comparable(self, truth: Truth) -> bool:
        return bool(truth.tests.strip())

    def agrees(self, text: str, truth: Truth) -> bool:
        from ..sandbox import passes

        return passes(text, truth.tests, timeout=truth.timeout, memory=truth.memory)
