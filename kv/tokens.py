"""Choosing the tokens that a cache of bounded size keeps, when a token is kept or dropped in all heads at once.

A retaining head predicts, for every KV head, the greatest logit with which a later token will attend to this one
(Locret, arXiv 2410.01805). Logits of different heads have no common scale. Standard scores have: by how many of the
head's own standard deviations a token stands out from all that were read. A token's one score is its greatest over all
heads, so a token that one head looks at sharply stays before one that many heads look at a little more than at others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .policy import Floats, Policy, View


class HeldTokens:
    """The tokens in a cache: their places in the text, ascending, and the scores (heads,) of all blocks' KV heads that
    each was given when it was read, which are never computed again."""

    def __init__(self, policy: Policy, blocks: int, kv_heads: int):
        self.policy, self.blocks, self.kv_heads = policy, blocks, kv_heads
        heads = blocks * kv_heads
        self.positions: NDArray[np.int64] = np.empty(0, np.int64)
        self._scores: Floats = np.empty((0, heads), np.float32)
        self._read = 0  # tokens, held or not: of their scores
        self._mean, self._squares = np.zeros(heads), np.zeros(heads)  # the mean, and the sum of squares around it

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, positions: range, predicted: Floats | None, decoding: bool) -> None:
        """Tokens that were read together; `predicted` (tokens, heads) where the policy needs it."""
        places, scores = np.asarray(positions, np.int64), np.empty((len(positions), self._scores.shape[1]), np.float32)
        for block in range(self.blocks):
            own = slice(block * self.kv_heads, (block + 1) * self.kv_heads)
            said = None if predicted is None else predicted[:, own].T
            scores[:, own] = self.policy.score(View(block, self.kv_heads, places, decoding, said)).T
        self.add(positions, scores)

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
        """One score per token held: its standard score in the head where it is greatest."""
        spread = np.sqrt(self._squares / max(self._read, 1))
        spread[spread == 0] = 1  # all the same: none stands out
        return ((self._scores - self._mean) / spread).max(1).astype(np.float32)

    def evict(self, budget: int, newest: int) -> NDArray[np.int64]:
        """Keep the `budget` best; the `newest` tokens and the policy's first ones count as infinitely good. Returns the
        positions dropped.

        Of equal scores the lower position wins. The last token always stays: llama.cpp can only continue from there.
        """
        if len(self) <= max(budget, 1):
            return np.empty(0, np.int64)
        scores = self.combined()
        scores[len(scores) - newest :] = np.inf
        scores[self.positions < self.policy.first] = np.inf
        best = np.argsort(-scores[:-1], kind="stable")[: max(budget, 1) - 1]
        kept = np.zeros(len(scores), bool)
        kept[best], kept[-1] = True, True
        dropped = self.positions[~kept]
        self.positions, self._scores = self.positions[kept], self._scores[kept]
        return dropped
