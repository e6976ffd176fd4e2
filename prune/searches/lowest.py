"""The least important blocks, ranked individually (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ...modeling.cuts import Cut, cut
from . import Search

if TYPE_CHECKING:
    from ..config import PruneConfig
    from ..study import Study


class Lowest(Search):
    """The least important blocks, adjacent or not."""

    kind: Literal["lowest"] = "lowest"

    def choose(self, study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
        """The `count` least important of `candidates`; of equals the first."""
        values = config.importance.windows(study, 1)
        return cut(sorted(candidates, key=lambda block: values[block])[:count])
