"""Which tokens a cache of bounded size keeps, where a token is kept or dropped in all heads at once.

A retaining head predicts, for every KV head, the greatest logit with which a later token will attend to this one
(Locret, arXiv 2410.01805). Logits of different heads have no common scale. exp(score), divided by the head's sum over
all tokens read, has: it estimates the share of the head's attention that is lost with the token, and the shares of all
heads add up. So a token stays that one head looks at sharply before one that many heads look at as at any other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .kv_budget import KvBudget

Floats = NDArray[np.float32]


def most_tokens(limits: KvBudget, new: int, context: int) -> int:
    """The most tokens that are ever held of a text of at most `context` tokens, `new` of them written at a time."""
    return min(context, limits.budget + max(limits.chunk, limits.local + (1 if limits.evict_decoding else new)))


class HeldTokens:
    """The tokens in a cache: their positions, ascending, and the scores (heads,) that each was given when it was
    read, which are never computed again."""

    def __init__(self, heads: int, sinks: int = 0):
        self.sinks = sinks  # first tokens of the text, which are never dropped
        self.positions: NDArray[np.int64] = np.empty(0, np.int64)
        self._scores: Floats = np.empty((0, heads), np.float32)
        self._total: Floats = np.full(heads, -np.inf, np.float32)  # log of Σ exp(score) over all that was read

    def __len__(self) -> int:
        return len(self.positions)

    def add(self, positions: range, scores: Floats) -> None:
        """Tokens that were read, with scores (tokens, heads)."""
        self.positions = np.concatenate([self.positions, np.asarray(positions, np.int64)])
        self._scores = np.concatenate([self._scores, scores])
        self._total = np.logaddexp(self._total, np.logaddexp.reduce(scores, axis=0))

    def combined(self) -> Floats:
        """One score per token held: its share of what was read, the mean over the heads."""
        return np.exp(self._scores - self._total).mean(1)

    def evict(self, budget: int, newest: int) -> NDArray[np.int64]:
        """Keep the `budget` best; the `newest` tokens count as infinitely good. Returns the positions dropped.

        Of equals the lower position wins. The very last token always stays: llama.cpp goes on from there only.
        """
        if len(self) <= max(budget, 1):
            return np.empty(0, np.int64)
        scores = self.combined()
        scores[len(scores) - newest :] = np.inf
        scores[self.positions < self.sinks] = np.inf
        best = np.argsort(-scores[:-1], kind="stable")[: max(budget, 1) - 1]
        kept = np.zeros(len(scores), bool)
        kept[best], kept[-1] = True, True
        dropped = self.positions[~kept]
        self.positions, self._scores = self.positions[kept], self._scores[kept]
        return dropped
