"""What sorted training takes: a student with as many losses as there are depths."""

from __future__ import annotations

from dataclasses import replace

from ..core.cost import Setting, StageCost
from ..training.cost import training_changes, training_need, training_work
from .config import SortConfig


def _leaves(config: SortConfig, at: Setting) -> Setting:
    """A model that runs, and is measured, at each depth."""
    at.check_depths("sort.depths", config.depths)
    return replace(at, depths=tuple(config.depths), measured=(*at.measured, *config.depths))


COST = StageCost[SortConfig](training_need, training_work, _leaves, training_changes)
