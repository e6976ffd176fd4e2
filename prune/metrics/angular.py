"""Angular distance (arXiv 2403.17887): arccos of the cosine between the hidden states around the blocks, over π."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from . import Metric

if TYPE_CHECKING:
    from ..study import Study


class Angular(Metric):
    """The arccos of the cosine between the hidden states around the blocks (arXiv 2403.17887)."""

    kind: Literal["angular"] = "angular"
    of_one_pass: ClassVar[bool] = True

    def windows(self, study: Study, length: int) -> list[float]:
        """Mean over tokens, for each run of `length` blocks."""
        return study.distances[study.position].windows("angular", length)
