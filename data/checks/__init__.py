"""When a rewrite may take gold's place, one check per file; the file's name is its name in the recipe.

A check compares the model's answer with what the row says is right. Where the row says nothing it can compare with,
gold stays, and no answer is generated.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...core.registry import Method, Registry

Column = Literal["answer", "tests"]
COLUMNS: dict[Column, str] = {"answer": "the final answer", "tests": "the Python tests"}


@dataclass(frozen=True)
class Truth:
    """What a row says of the right answer, and the keys of `rewrite` that concern checks."""

    gold: str  # the last answer, as in the data set
    answer: str = ""  # its final answer, if a column has it
    tests: str = ""  # Python tests, if a column has them
    marker: str | None = None  # words that introduce the final answer
    timeout: float = 5.0  # seconds for one row's tests
    memory: int = 512  # megabytes for one row's tests


class Check(Method):
    """Base of all checks."""

    needs: ClassVar[frozenset[Column]] = frozenset()  # columns that a recipe with this check has to name

    @property
    def passed(self) -> str:
        """What the row's `why` says of a rewrite that was accepted."""
        return f"{self.kind} agrees"

    def comparable(self, truth: Truth) -> bool:
        """Whether the row has something to compare with."""
        return True

    @abstractmethod
    def agrees(self, text: str, truth: Truth) -> bool:
        """Whether the answer `text` is right; asked for comparable rows only."""


class FinalAnswer(Check):
    """The text's final answer equals gold's, or the one in the row's column `answer`."""

    @abstractmethod
    def find(self, text: str, marker: str | None) -> Hashable | None:
        """The final answer of a text, in a form that can be compared; None if it has none of this kind."""

    def stated(self, answer: str) -> Hashable | None:
        """The same of a text that is nothing but the final answer."""
        return self.find(answer, None)

    def comparable(self, truth: Truth) -> bool:
        return self._expected(truth) is not None

    def agrees(self, text: str, truth: Truth) -> bool:
        expected = self._expected(truth)
        return expected is not None and self.find(text, truth.marker) == expected

    def _expected(self, truth: Truth) -> Hashable | None:
        return self.stated(truth.answer) if truth.answer else self.find(truth.gold, truth.marker)


CHECKS = Registry(__name__, Check, "compress.checks", "check", ("none", "number", "choice", "exact", "python"))
