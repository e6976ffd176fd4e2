"""Early exit: take a token from the first depth that is confident enough (instance-aware exit, SoFT, 2309.08968).

Depths are tried in ascending order. A depth that is not confident costs only its head; the next depth continues from
its blocks' hidden states. Blocks that a token skipped have no keys and values for it until a later token needs them:
then they read everything they missed in one batch, from the stored hidden states (`block_chain`), so that their cache
is the same as if the model never exited early.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .block_chain import CachedText


def choose_at_first_confident(text: CachedText, exits: Mapping[int, float], deepest: int) -> tuple[int, np.ndarray]:
    """(depth, its logits (V,)) of the first depth whose most likely token has a probability above its threshold.

    `exits` maps depths to thresholds; 0 always exits there, 1 never. If none exits, `deepest` decides.
    """
    for depth in sorted(exits):
        if depth < deepest:
            logits = text.logits(depth)[0]
            if confidence(logits) > exits[depth]:
                return depth, logits
    return deepest, text.logits(deepest)[0]


def confidence(logits: np.ndarray) -> float:
    """The probability of the most likely token, from logits (V,); never more than 1."""
    shifted = logits.astype(np.float64) - logits.max()
    return float(1 / np.exp(shifted).sum())
