"""KL divergence from the unpruned model on the scoring rows without the blocks: needs no gold text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import Metric

if TYPE_CHECKING:
    from ..study import Study


class Kl(Metric):
    """KL(unpruned ‖ model without the blocks) on the scoring rows."""

    kind: Literal["kl"] = "kl"

    def windows(self, study: Study, length: int) -> list[float]:
        """Nats per token without each run of `length` blocks, nothing healed."""
        return study.removal("kl", length)
