"""The final numbers are equal, exactly: 1,234.50 = 1234.5, 3/4 = 0.75."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from ..final_answers import final_number, stated_number
from . import FinalAnswer


class FinalNumber(FinalAnswer):
    """The final numbers are equal, exactly: 1,234.50 = 1234.5, 3/4 = 0.75."""

    kind: Literal["number"] = "number"

    def find(self, text: str, marker: str | None) -> Fraction | None:
        return final_number(text, marker)

    def stated(self, answer: str) -> Fraction | None:
        return stated_number(answer)
