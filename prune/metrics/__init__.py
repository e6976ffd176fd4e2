"""Importance metrics: the cost of dropping blocks, one per file; the file's name is the metric's name in the recipe.

A metric is a class with its options, if any, as fields and a function `windows`. It receives the study
(prune/study.py), which has the unpruned model, the rows and all earlier measurements. Values of different metrics are
not comparable.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ...core.registry import Method, Registry

if TYPE_CHECKING:
    from ..study import Study


class Metric(Method):
    """Base of all metrics."""

    of_one_pass: ClassVar[bool] = False  # needs only the pass over hidden states that every study makes

    @abstractmethod
    def windows(self, study: Study, length: int) -> list[float]:
        """The loss from dropping each run of `length` adjacent blocks, by first block: L − length + 1 values; higher is
        worse."""


METRICS = Registry(
    __name__,
    Metric,
    "compress.metrics",
    "metric",
    ("angular", "influence", "magnitude", "taylor", "perplexity", "kl"),
)
