"""Angular distance (arXiv 2403.17887): arccos of the cosine between the hidden states around the blocks, over π."""

from __future__ import annotations

from ..study import Study


def windows(study: Study, length: int) -> list[float]:
    """Mean over tokens, for each run of `length` blocks."""
    return study.distances[study.position].windows("angular", length)
