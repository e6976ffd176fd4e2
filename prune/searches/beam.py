"""The best few cuts of each size, grown block by block; then exchanges of one dropped block for a kept one.

Greedy choices cannot be taken back: blocks that are cheap alone may be dear together. A beam keeps `width` cuts
of each size. From the best full-sized one, rounds of exchanges go to the best neighbour not yet visited, even where
it is worse; they end after `patience` rounds in which held-out rows did not find the cut better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from . import Scored

if TYPE_CHECKING:
    from ..config import PruneConfig
    from ..cuts import Cut
    from ..study import Study


class Beam(Scored):
    """The best few cuts of each size, then exchanges of a dropped block for a kept one."""

    kind: Literal["beam"] = "beam"
    width: int = Field(default=3, ge=1, description="beam width: cuts kept of each size")
    patience: int = Field(
        default=1, ge=0, description="rounds of exchanges without improvement on held-out rows before the search stops"
    )

    def choose(self, study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
        """The best cut on held-out rows of those the beam and the exchanges ended with."""
        from ..trials import Trials

        trials = Trials(study, config, self, count, candidates)
        with trials.progress(count * self.width * len(candidates)):
            finalists = trials.grow(self.width)
            best = trials.best(finalists)
            current, visited, failed = best, set(finalists), 0
            while failed < self.patience and (neighbour := trials.exchange(current, visited)) is not None:
                visited.add(neighbour)
                current = neighbour
                failed = 0 if trials.best([best, neighbour]) == neighbour else failed + 1
                best = trials.best([best, neighbour])
        return trials.guarded(best)
