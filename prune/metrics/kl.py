"""KL(unpruned ‖ model without the blocks) on the scoring rows; unlike perplexity it does not depend on their text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import Metric

if TYPE_CHECKING:
    from ..study import Study


class Kl(Metric):
    """KL(unpruned ‖ model without the blocks) on the scoring rows."""

    kind: Literal["kl"] = "kl"

    def windows(self, study: Study, length: int) -> list[float]:
        """Nats per token without each run of `length` blocks, unhealed."""
        return study.removal("kl", length)
