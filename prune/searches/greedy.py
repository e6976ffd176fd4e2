"""Greedy search: each round drops the block whose removal costs least, given those already dropped (as SLEB, arXiv
2402.09025; optionally scored by KL, and healed)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import Scored

if TYPE_CHECKING:
    from ...modeling.cuts import Cut
    from ..config import PruneConfig
    from ..study import Study


class Greedy(Scored):
    """Block by block, each time the one that costs least (as SLEB, arXiv 2402.09025)."""

    kind: Literal["greedy"] = "greedy"

    def choose(self, study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
        """`count` rounds, each over all remaining candidates; then the guard, if it is on."""
        from ..trials import Trials

        trials = Trials(study, config, self, count, candidates)
        with trials.progress(count * len(candidates)):
            (best,) = trials.grow(1)
        return trials.guarded(best)
