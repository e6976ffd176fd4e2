"""What dropping blocks costs, one metric per file; the file's name is the metric's name in the recipe.

A metric is a class with its options, if it has any, as fields and a function `windows`. It is given the study
(prune/study.py): the unpruned model, the rows, and what was measured already. Values of different metrics cannot be
compared.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ...core.registry import Method, Registry

if TYPE_CHECKING:
    from ..study import Study


class Metric(Method):
    """Base of all metrics."""

    of_one_pass: ClassVar[bool] = False  # costs nothing but the pass over hidden states that every study makes

    @abstractmethod
    def windows(self, study: Study, length: int) -> list[float]:
        """For each run of `length` adjacent blocks, by its first block, how much is lost without it: L − length + 1
        values, higher is worse."""


METRICS = Registry(
    __name__,
    Metric,
    "compress.metrics",
    "metric",
    ("angular", "influence", "magnitude", "taylor", "perplexity", "kl"),
)
