"""The run of adjacent blocks that costs least (arXiv 2403.17887)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ...modeling.cuts import Cut, cut
from . import Search

if TYPE_CHECKING:
    from ..config import PruneConfig
    from ..study import Study


class Window(Search):
    """The best run of adjacent blocks (arXiv 2403.17887)."""

    kind: Literal["window"] = "window"

    def choose(self, study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
        """`count` adjacent blocks, all within `candidates`; of equals the first."""
        values = config.importance.windows(study, count)
        first = min(range(candidates.start, candidates.stop - count + 1), key=lambda start: values[start])
        return cut(range(first, first + count))
