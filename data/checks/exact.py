"""The final texts are equal but for case, spacing and surrounding punctuation."""

from __future__ import annotations

from typing import Literal

from ..final_answers import final_text
from . import FinalAnswer


class FinalText(FinalAnswer):
    """The final texts are equal but for case, spacing and surrounding punctuation."""

    kind: Literal["exact"] = "exact"

    def find(self, text: str, marker: str | None) -> str | None:
        return final_text(text, marker)
