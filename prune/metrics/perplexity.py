"""The perplexity on the scoring rows without the blocks (the first round of SLEB, arXiv 2402.09025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import Metric

if TYPE_CHECKING:
    from ..study import Study


class Perplexity(Metric):
    """The perplexity of the scoring rows without the blocks."""

    kind: Literal["perplexity"] = "perplexity"

    def windows(self, study: Study, length: int) -> list[float]:
        """Exp of the mean negative log-likelihood without each run of `length` blocks, unhealed."""
        return study.removal("perplexity", length)
