"""Block influence (ShortGPT, arXiv 2403.03853): one minus the cosine between the hidden states around the blocks."""

from __future__ import annotations

from ..study import Study


def windows(study: Study, length: int) -> list[float]:
    """Mean over tokens, for each run of `length` blocks."""
    return study.distances[study.position].windows("influence", length)
