"""Block by block: each round drops the one whose loss costs least behind those already dropped (as SLEB, arXiv
2402.09025, and with KL or healing where asked for)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import Scored

if TYPE_CHECKING:
    from ..config import PruneConfig
    from ..cuts import Cut
    from ..study import Study


class Greedy(Scored):
    """Block by block, each time the one that costs least (as SLEB, arXiv 2402.09025)."""

    kind: Literal["greedy"] = "greedy"

    def choose(self, study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
        """`count` rounds, each over all candidates that are left; then the guard, if asked for."""
        from ..trials import Trials

        trials = Trials(study, config, self, count, candidates)
        with trials.progress(count * len(candidates)):
            (best,) = trials.grow(1)
        return trials.guarded(best)
