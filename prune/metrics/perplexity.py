"""The perplexity on the scoring rows without the blocks (the first round of SLEB, arXiv 2402.09025)."""

from __future__ import annotations

from ..study import Study


def windows(study: Study, length: int) -> list[float]:
    """Exp of the mean negative log-likelihood without each run of `length` blocks, nothing healed."""
    return study.removal("perplexity", length)
