"""Beam search over cuts, block by block, then local search that exchanges one dropped block for a kept one.

Greedy choices are final, but blocks that are cheap alone may be expensive together. The beam keeps the best `width`
cuts of each size. From the best full-sized cut, each exchange moves to the best unvisited neighbour, even a worse one;
the search stops after `patience` rounds without improvement on the held-out rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from . import Scored

if TYPE_CHECKING:
    from ...modeling.cuts import Cut
    from ..config import PruneConfig
    from ..study import Study


class Beam(Scored):
    """Beam search, then exchanges of a dropped block for a kept one."""

    kind: Literal["beam"] = "beam"
    width: int = Field(default=3, ge=1, description="beam width: cuts kept of each size")
    patience: int = Field(
        default=1, ge=0, description="rounds of exchanges without improvement on held-out rows before the search stops"
    )

    def choose(self, study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
        """The best cut on the held-out rows among the results of the beam and of the exchanges."""
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
