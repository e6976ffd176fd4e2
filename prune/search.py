"""Choosing the blocks to drop from their distances."""

from __future__ import annotations

from ..errors import UserError
from .importance import Distances


def best_window(distances: Distances, metric: str, count: int, candidates: range) -> list[int]:
    """The `count` adjacent blocks, all within `candidates`, whose ends are closest; the first of equals."""
    _check(count, candidates)
    if count == 0:
        return []
    values = distances.windows(metric, count)
    first = min(range(candidates.start, candidates.stop - count + 1), key=lambda start: values[start])
    return list(range(first, first + count))


def lowest(distances: Distances, metric: str, count: int, candidates: range) -> list[int]:
    """The `count` blocks within `candidates` that change their input least, each on its own; the first of equals."""
    _check(count, candidates)
    values = distances.windows(metric, 1)
    return sorted(sorted(candidates, key=lambda block: values[block])[:count])


def _check(count: int, candidates: range) -> None:
    if count > len(candidates):
        where = f" (blocks {candidates.start} to {candidates.stop - 1})" if candidates else ""
        raise UserError(f"prune.blocks is {count}, but only {len(candidates)} blocks can go{where}; lower prune.blocks")
