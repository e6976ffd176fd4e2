"""Block by block: each round drops the one whose loss costs least behind those already dropped (as SLEB, arXiv
2402.09025, and with KL or healing where asked for)."""

from __future__ import annotations

from ..config import PruneConfig
from ..cuts import Cut
from ..study import Study
from .trials import Trials


def choose(study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
    """`count` rounds, each over all candidates that are left; then the guard, if asked for."""
    trials = Trials(study, config, count, candidates)
    with trials.progress(count * len(candidates)):
        (best,) = trials.grow(1)
    return trials.guarded(best)
