"""Keeps the first tokens and the newest ones (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..policy import Floats, Policy, View

SINKS = 4  # first tokens, as published


class Recent(Policy):
    """The score of a token is its position."""

    kind: Literal["recent"] = "recent"

    @property
    def first(self) -> int:
        return SINKS

    def score(self, view: View) -> Floats:
        return np.repeat(view.places[None].astype(np.float32), view.heads, 0)
