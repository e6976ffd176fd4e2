"""Which tokens a cache of bounded size keeps, where a token is kept or dropped in all heads at once.

A retaining head predicts, for every KV head, the greatest logit with which a later token will attend to this one
(Locret, arXiv 2410.01805). Logits of different heads have no common scale. Standard scores have: by how many of the
head's own standard deviations a token stands out from all that were read. A token's one score is its greatest over all
heads, so a token that one head looks at sharply stays before one that many heads look at a little more than at others.
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
        self._read = 0  # tokens, held or not: of their scores
        self._mean, self._squares = np.zeros(heads), np.zeros(heads)  # the mean, and the sum of squares around it

    def __len__(self) -> int:
        return len(self.positions)

    def add(self, positions: range, scores: Floats) -> None:
        """Tokens that were read, with scores (tokens, heads)."""
        self.positions = np.concatenate([self.positions, np.asarray(positions, np.int64)])
        self._scores = np.concatenate([self._scores, scores])
        new, before = len(scores), self._read
        mean = scores.mean(0, dtype=np.float64)
        off = mean - self._mean
        self._read += new
        self._mean += off * new / self._read
        self._squares += np.square(scores - mean).sum(0) + np.square(off) * before * new / self._read

    def combined(self) -> Floats:
        """One score per token held: how far it stands out, in the head where it does most."""
        spread = np.sqrt(self._squares / max(self._read, 1))
        spread[spread == 0] = 1  # all the same: none stands out
        return ((self._scores - self._mean) / spread).max(1).astype(np.float32)

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
