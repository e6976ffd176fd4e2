"""No healing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import Heal

if TYPE_CHECKING:
    from ...records.importance import Healing
    from ..stream import Gap, Values


class NoHeal(Heal):
    """Leave the gap as it is."""

    kind: Literal["none"] = "none"

    def fit(self, gap: Gap) -> tuple[Values, Healing]:
        raise AssertionError("heal: none fits no gap")
