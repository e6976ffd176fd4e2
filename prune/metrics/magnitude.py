"""Relative magnitude (arXiv 2403.03853, §2.2): the length of what the blocks add, as a share of what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from . import Metric

if TYPE_CHECKING:
    from ..study import Study


class Magnitude(Metric):
    """The length of what the blocks add, as a share of what comes out (arXiv 2403.03853)."""

    kind: Literal["magnitude"] = "magnitude"
    of_one_pass: ClassVar[bool] = True

    def windows(self, study: Study, length: int) -> list[float]:
        """Mean over tokens, for each run of `length` blocks."""
        return study.distances[study.position].windows("magnitude", length)
