"""Cost of recovery: one student, or one per variant."""

from __future__ import annotations

from dataclasses import replace

from ..core.cost import Setting, StageCost
from ..core.work import Work
from ..training.cost import training_changes, training_need, training_work
from .config import DistillConfig


def _work(config: DistillConfig, at: Setting) -> Work | None:
    rows = [variant.rows for variant in config.variants] if config.variants else [(0.0, 1.0)]
    return training_work(config, at, [end - start for start, end in rows])


def _leaves(config: DistillConfig, at: Setting) -> Setting:
    return replace(at, recovered=True, variants=len(config.students), measured=(*at.measured, at.kept))


COST = StageCost[DistillConfig](training_need, _work, _leaves, training_changes)
