"""Block influence (ShortGPT, arXiv 2403.03853): one minus the cosine between the hidden states around the blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from . import Metric

if TYPE_CHECKING:
    from ..study import Study


class Influence(Metric):
    """One minus the cosine between the hidden states around the blocks (ShortGPT, arXiv 2403.03853)."""

    kind: Literal["influence"] = "influence"
    of_one_pass: ClassVar[bool] = True

    def windows(self, study: Study, length: int) -> list[float]:
        """Mean over tokens, for each run of `length` blocks."""
        return study.distances[study.position].windows("influence", length)
