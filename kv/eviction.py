"""Which entries of one block's KV heads stay: first tokens and protected ones, then the best of the rest.

Each of G KV heads holds n entries in the order of the text, and evicts its own. Where a runtime can only drop a token
from all heads at once, `tokens` chooses.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .policy import Floats, Policy, View


def entry_scores(policy: Policy, view: View) -> Floats:
    """A policy's scores, (G, T) or (G, n), with the text's first tokens at inf where they are to stay."""
    scores = policy.score(view)
    first = int(np.searchsorted(view.places, policy.first))
    if first:
        scores = scores.copy()
        start = scores.shape[1] - len(view.places)
        scores[:, start : start + first] = np.inf
    return scores


def best(scores: Floats, budget: int, protected: int = 0) -> NDArray[np.int64]:
    """Indices (G, budget), ascending, of the greatest of scores (G, n), n ≥ budget, the last `protected` among them; of
    equal ones the first."""
    ranks = -scores
    if protected:
        ranks[:, ranks.shape[1] - protected :] = -np.inf
    return np.sort(np.argsort(ranks, axis=1, kind="stable")[:, :budget], axis=1)


def worst(scores: Floats, protected: int = 0) -> NDArray[np.int64]:
    """Index (G,) of the smallest of scores (G, n) without the last `protected`; of equal ones the last: the one entry
    that `best` leaves out of n - 1."""
    older = scores[:, : scores.shape[1] - protected]
    return older.shape[1] - 1 - older[:, ::-1].argmin(axis=1)
