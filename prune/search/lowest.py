"""The least important blocks, each on its own, wherever they are (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from ..config import PruneConfig
from ..cuts import Cut, cut
from ..metrics import windows
from ..study import Study


def choose(study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
    """The `count` lowest within `candidates`; the first of equals."""
    values = windows(config.importance, study, 1)
    return cut(sorted(candidates, key=lambda block: values[block])[:count])
