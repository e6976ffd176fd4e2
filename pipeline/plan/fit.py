"""The smallest change to a recipe that makes a stage fit in memory, found by planning with it.

Changes are tried in the order of what they cost: first the ones that leave the result as it is, then those that hold
weights in fewer bits, at last those that give up context. If no single one is enough, they are added up in this order,
and those that turn out not to be needed are left out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...core.cost import Overrides, Setting
from ...core.errors import UserError
from ..recipe import Recipe
from ..stages import STAGES


@dataclass(frozen=True)
class Change:
    """Overrides as `--set` takes them, and the stage's peak memory with them."""

    overrides: Overrides
    memory: int


def smallest_change(loaded: Recipe, stage: str, at: Setting, room: int) -> Change | None:
    """The first change, or the fewest changes, with which the stage fits; None where nothing in the list is enough."""
    steps = []
    for step in STAGES[stage].cost.changes(loaded.section(stage), at):
        memory = _peak(loaded, stage, at, step)
        if memory is not None and memory <= room:
            return Change(step, memory)
        if memory is not None:
            steps.append(step)
    taken: list[Overrides] = []
    for step in steps:
        taken.append(step)
        memory = _peak(loaded, stage, at, _flat(taken))
        if memory is not None and memory <= room:
            return _without_needless(loaded, stage, at, room, taken)
    return None


def _without_needless(loaded: Recipe, stage: str, at: Setting, room: int, taken: list[Overrides]) -> Change | None:
    # The dearest are tried first: what came later changes more.
    for step in list(reversed(taken)):
        rest = [other for other in taken if other is not step]
        memory = _peak(loaded, stage, at, _flat(rest))
        if memory is not None and memory <= room:
            taken = rest
    overrides = _flat(taken)
    memory = _peak(loaded, stage, at, overrides)
    return None if memory is None else Change(overrides, memory)


def _flat(steps: Sequence[Overrides]) -> Overrides:
    """All overrides, the last of each key only."""
    found: dict[str, str] = {}
    for override in (override for step in steps for override in step):
        found[override.partition("=")[0]] = override
    return tuple(found.values())


def _peak(loaded: Recipe, stage: str, at: Setting, overrides: Sequence[str]) -> int | None:
    """The stage's peak memory with these overrides; None where the recipe does not take them."""
    try:
        changed = loaded.changed(overrides)
    except UserError:
        return None
    return STAGES[stage].cost.need(changed.section(stage), at).needed
