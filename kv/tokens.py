"""Chooses the tokens that a bounded cache keeps when a token can only be kept or dropped in all heads at once.

A retaining head predicts, for every KV head, the largest logit with which a later token will attend to this one
(Locret, arXiv 2410.01805). Logits of different heads are not comparable; standard scores are: the distance from the
head's mean over all tokens read, in its own standard deviations. A token's score is its maximum over all heads, so a
token to which one head attends strongly ranks above one to which many heads attend slightly more than average.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .policy import Floats, Policy, View


class HeldTokens:
    """The tokens in a cache: their positions in the text, ascending, and the scores (heads,) that each got from all
    blocks' KV heads when it was read."""

    def __init__(self, policy: Policy, blocks: int, kv_heads: int):
        self.policy, self.blocks, self.kv_heads = policy, blocks, kv_heads
        heads = blocks * kv_heads
        self.positions: NDArray[np.int64] = np.empty(0, np.int64)
        self._scores: Floats = np.empty((0, heads), np.float32)
        self._read = 0  # tokens read so far, including dropped ones
        self._mean, self._squares = np.zeros(heads), np.zeros(heads)  # of their scores: mean, sum of squares around it

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, positions: range, predicted: Floats | None, decoding: bool) -> None:
        """Add tokens that were read together; `predicted` (tokens, heads) if the policy needs it."""
        places, scores = np.asarray(positions, np.int64), np.empty((len(positions), self._scores.shape[1]), np.float32)
        for block in range(self.blocks):
            own = slice(block * self.kv_heads, (block + 1) * self.kv_heads)
            predictions = None if predicted is None else predicted[:, own].T
            scores[:, own] = self.policy.score(View(block, self.kv_heads, places, decoding, predictions)).T
        self.add(positions, scores)

    def add(self, positions: range, scores: Floats) -> None:
        """Add tokens with their scores (tokens, heads)."""
        self.positions = np.concatenate([self.positions, np.asarray(positions, np.int64)])
        self._scores = np.concatenate([self._scores, scores])
        new, before = len(scores), self._read
        mean = scores.mean(0, dtype=np.float64)
        off = mean - self._mean
        self._read += new
        self._mean += off * new / self._read
        self._squares += np.square(scores - mean).sum(0) + np.square(off) * before * new / self._read

    def combined(self) -> Floats:
        """One score per token held: the maximum over heads of its standard scores."""
        spread = np.sqrt(self._squares / max(self._read, 1))
        spread[spread == 0] = 1  # all scores are equal: no token stands out
        return ((self._scores - self._mean) / spread).max(1).astype(np.float32)

    def evict(self, budget: int, newest: int) -> NDArray[np.int64]:
        """Keep the `budget` best tokens; the `newest` ones and the policy's first ones score infinity. Returns the
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
