"""Relative magnitude (arXiv 2403.03853, §2.2): the length of what the blocks add, as a share of what comes out."""

from __future__ import annotations

from ..study import Study


def windows(study: Study, length: int) -> list[float]:
    """Mean over tokens, for each run of `length` blocks."""
    return study.distances[study.position].windows("magnitude", length)
