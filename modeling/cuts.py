"""Sets of blocks to drop."""

from __future__ import annotations

from collections.abc import Iterable

Cut = tuple[int, ...]  # block numbers, ascending


def cut(blocks: Iterable[int]) -> Cut:
    """The cut that drops these blocks."""
    return tuple(sorted(set(blocks)))


def gaps(dropped: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of adjacent blocks as (first, last), in order."""
    runs: list[tuple[int, int]] = []
    for block in sorted(dropped):
        if runs and runs[-1][1] == block - 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return runs


def describe(dropped: Iterable[int]) -> str:
    """Block numbers as compact text: 3, 17-22."""
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in gaps(dropped)) or "none"
