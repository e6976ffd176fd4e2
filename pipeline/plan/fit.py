"""The smallest change to a recipe that makes a stage fit in memory, found by planning with it.

Changes are tried in order of their cost: first those that leave the result the same, then those that hold weights in
fewer bits, finally those that shorten the context. If no single one is enough, they are combined in this order, and
those that turn out to be unnecessary are dropped again.
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
    """Overrides for `--set`, and the stage's peak memory with them."""

    overrides: Overrides
    memory: int


def smallest_change(loaded: Recipe, stage: str, at: Setting, room: int) -> Change | None:
    """The first change, or the fewest changes, with which the stage fits; None if all together are not enough."""
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
    # The most expensive are dropped first: later ones change more.
    for step in list(reversed(taken)):
        rest = [other for other in taken if other is not step]
        memory = _peak(loaded, stage, at, _flat(rest))
        if memory is not None and memory <= room:
            taken = rest
    overrides = _flat(taken)
    memory = _peak(loaded, stage, at, overrides)
    return None if memory is None else Change(overrides, memory)


def _flat(steps: Sequence[Overrides]) -> Overrides:
    """All overrides, for each key only the last."""
    last: dict[str, str] = {}
    for override in (override for step in steps for override in step):
        last[override.partition("=")[0]] = override
    return tuple(last.values())


def _peak(loaded: Recipe, stage: str, at: Setting, overrides: Sequence[str]) -> int | None:
    """The stage's peak memory with these overrides; None if the recipe does not accept them."""
    try:
        changed = loaded.changed(overrides)
    except UserError:
        return None
    return STAGES[stage].cost.need(changed.section(stage), at).needed
