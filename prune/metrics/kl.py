"""KL divergence from the unpruned model on the scoring rows without the blocks: needs no gold text."""

from __future__ import annotations

from ..study import Study


def windows(study: Study, length: int) -> list[float]:
    """Nats per token without each run of `length` blocks, nothing healed."""
    return study.removal("kl", length)
