"""Cost of sorted training: a student with one loss per depth."""

from __future__ import annotations

from dataclasses import replace

from ..core.cost import Setting, StageCost
from ..training.cost import training_changes, training_need, training_work
from .config import SortConfig


def _leaves(config: SortConfig, at: Setting) -> Setting:
    """A model that later stages run and measure at each depth."""
    at.check_depths("sort.depths", config.depths)
    return replace(at, depths=tuple(config.depths), measured=(*at.measured, *config.depths))


COST = StageCost[SortConfig](training_need, training_work, _leaves, training_changes)
