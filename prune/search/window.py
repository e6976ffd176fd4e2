"""The run of adjacent blocks that costs least (arXiv 2403.17887)."""

from __future__ import annotations

from ..config import PruneConfig
from ..cuts import Cut, cut
from ..metrics import windows
from ..study import Study


def choose(study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
    """`count` adjacent blocks, all within `candidates`; the first of equals."""
    values = windows(config.importance, study, count)
    first = min(range(candidates.start, candidates.stop - count + 1), key=lambda start: values[start])
    return cut(range(first, first + count))
