"""Trained heads (Locret, arXiv 2410.01805), their scores averaged over neighbouring tokens (as SnapKV, 2404.14469)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np

from ..policy import Floats, Policy, View

if TYPE_CHECKING:
    from ..settings import KvBudget


class Retaining(Policy):
    """The heads' predictions, averaged over `pool` neighbours read together; the first `sinks` tokens always stay."""

    kind: Literal["retaining"] = "retaining"
    needs: ClassVar = frozenset({"heads"})
    pool: int = 1
    sinks: int = 0

    @classmethod
    def of(cls, settings: KvBudget, seed: int) -> Self:
        return cls(pool=settings.pool, sinks=settings.sinks)

    @property
    def first(self) -> int:
        return self.sinks

    def score(self, view: View) -> Floats:
        assert view.predicted is not None
        return pooled(view.predicted, self.pool)


def pooled(scores: Floats, kernel: int) -> Floats:
    """Moving averages of scores (G, T) over `kernel` (odd) consecutive tokens centred on each, fewer at the ends."""
    count, reach = scores.shape[1], kernel // 2
    if reach == 0 or count == 1:
        return scores
    sums = np.zeros((len(scores), count + 1))
    np.cumsum(scores, axis=1, dtype=np.float64, out=sums[:, 1:])
    first = np.maximum(np.arange(count) - reach, 0)
    end = np.minimum(np.arange(count) + reach + 1, count)
    return ((sums[:, end] - sums[:, first]) / (end - first)).astype(np.float32)
