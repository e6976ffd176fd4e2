"""Relative magnitude (arXiv 2403.03853, §2.2): the norm of what the blocks add, relative to that of their output."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from . import Metric

if TYPE_CHECKING:
    from ..study import Study


class Magnitude(Metric):
    """The norm of what the blocks add, relative to that of their output (arXiv 2403.03853)."""

    kind: Literal["magnitude"] = "magnitude"
    of_one_pass: ClassVar[bool] = True

    def windows(self, study: Study, length: int) -> list[float]:
        """Mean over tokens, for each run of `length` blocks."""
        return study.distances[study.position].windows("magnitude", length)
