"""The same letter, A to J, is chosen."""

from __future__ import annotations

from typing import Literal

from ..final_answers import final_choice
from . import FinalAnswer


class FinalChoice(FinalAnswer):
    """The same letter, A to J, is chosen."""

    kind: Literal["choice"] = "choice"

    def find(self, text: str, marker: str | None) -> str | None:
        return final_choice(text, marker)
