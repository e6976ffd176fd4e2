"""Chooses the entries that one block's KV heads keep: the first tokens and protected ones, then the best of the rest.

Each of G KV heads holds n entries in text order, and evicts independently. `tokens` is for runtimes that can only drop
a token from all heads at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .policy import Floats, Policy, View


def entry_scores(policy: Policy, view: View) -> Floats:
    """A policy's scores, (G, T) or (G, n), with inf for first tokens that must stay."""
    scores = policy.score(view)
    first = int(np.searchsorted(view.places, policy.first))
    if first:
        scores = scores.copy()
        start = scores.shape[1] - len(view.places)
        scores[:, start : start + first] = np.inf
    return scores


def best(scores: Floats, budget: int, protected: int = 0) -> NDArray[np.int64]:
    """Indices (G, budget), ascending, of the highest of scores (G, n), n ≥ budget, always including the last
    `protected`; of equal scores the first."""
    ranks = -scores
    if protected:
        ranks[:, ranks.shape[1] - protected :] = -np.inf
    return np.sort(np.argsort(ranks, axis=1, kind="stable")[:, :budget], axis=1)


def worst(scores: Floats, protected: int = 0) -> NDArray[np.int64]:
    """Index (G,) of the lowest of scores (G, n), excluding the last `protected`; of equal scores the last. It is the
    entry that `best` drops for a budget of n - 1."""
    older = scores[:, : scores.shape[1] - protected]
    return older.shape[1] - 1 - older[:, ::-1].argmin(axis=1)
