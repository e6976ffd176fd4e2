"""The best few cuts of each size, grown block by block; then exchanges of one dropped block for a kept one.

Greedy choices cannot be taken back: blocks that are cheap alone may be dear together. A beam keeps `width` cuts
of each size. From the best full-sized one, rounds of exchanges go to the best neighbour not yet visited, even where
it is worse; they end after `patience` rounds in which held-out rows did not find the cut better.
"""

from __future__ import annotations

from ..config import Beam, PruneConfig
from ..cuts import Cut
from ..study import Study
from .trials import Trials


def choose(study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
    """The best cut on held-out rows of those the beam and the exchanges ended with."""
    beam = config.search
    assert isinstance(beam, Beam)
    trials = Trials(study, config, count, candidates)
    with trials.progress(count * beam.width * len(candidates)):
        finalists = trials.grow(beam.width)
        best = trials.best(finalists)
        current, visited, failed = best, set(finalists), 0
        while failed < beam.patience and (neighbour := trials.exchange(current, visited)) is not None:
            visited.add(neighbour)
            current = neighbour
            failed = 0 if trials.best([best, neighbour]) == neighbour else failed + 1
            best = trials.best([best, neighbour])
    return trials.guarded(best)
