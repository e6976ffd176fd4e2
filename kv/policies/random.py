"""Random scores, as the baseline that any other policy must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ..policy import Floats, Policy, View

if TYPE_CHECKING:
    from ..settings import KvBudget


class Random(Policy):
    """Scores in [0, 1) per block, KV head and position that depend on the seed, but not on how the text is chunked."""

    kind: Literal["random"] = "random"
    seed: int = 0

    @classmethod
    def of(cls, settings: KvBudget, seed: int) -> Self:
        return cls(seed=seed)

    def score(self, view: View) -> Floats:
        head = np.arange(view.heads)[:, None]
        return uniform(((self.seed * 4099 + view.block) * 257 + head) * 2**24 + view.places)


def uniform(keys: NDArray[np.int64]) -> Floats:
    """Hashes integers to [0, 1) with SplitMix64's mixing function."""
    z = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
