"""Which type each tensor gets, so that the sum of the damage is least at a number of bytes.

A knapsack with one choice per tensor. Along the lower convex hull of a tensor's (bytes, damage) each further byte buys
less than the one before, so that taking the best bargain first is optimal but for the last bytes; large tensors, whose
steps are coarse, are tried in every type.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
LARGE = 0.08  # of the budget: a tensor whose dearest type takes more is tried in every type
TRIES = 200  # combinations of large tensors' types that are tried at most


@dataclass(frozen=True)
class Option:
    """What a tensor is in a type."""

    bytes: int
    damage: float  # nats per token


def choose(options: Mapping[str, Mapping[K, Option]], budget: int) -> dict[str, K]:
    """Tensor → type with the least damage in at most `budget` bytes. Raises `ValueError` where nothing fits."""
    hulls = {name: _hull(kinds) for name, kinds in options.items()}
    if sum(hull[0][1].bytes for hull in hulls.values()) > budget:
        raise ValueError(f"the smallest choice takes {smallest(options)} bytes, more than {budget}")
    large = [name for name, hull in hulls.items() if hull[-1][1].bytes > LARGE * budget and len(hull) > 1]
    best: tuple[float, dict[str, K]] | None = None
    for fixed in _combinations(large, hulls):
        found = _greedy(hulls | {name: [step] for name, step in fixed.items()}, budget)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    assert best is not None, "the cheapest combination fits"
    return best[1]


def smallest(options: Mapping[str, Mapping[K, Option]]) -> int:
    """The least bytes that any choice takes."""
    return sum(min(option.bytes for option in kinds.values()) for kinds in options.values())


def total(options: Mapping[str, Mapping[K, Option]], chosen: Mapping[str, K]) -> Option:
    """Bytes and damage of a choice."""
    found = [options[name][kind] for name, kind in chosen.items()]
    return Option(sum(option.bytes for option in found), sum(option.damage for option in found))


_Step = tuple[K, Option]


def _hull(kinds: Mapping[K, Option]) -> list[_Step[K]]:
    """The types on the lower convex hull, by ascending bytes: each costs less damage per byte than the one before."""
    hull: list[_Step[K]] = []
    for kind, option in sorted(kinds.items(), key=lambda item: (item[1].bytes, item[1].damage)):
        if hull and option.damage >= hull[-1][1].damage:
            continue
        while len(hull) > 1 and _slope(hull[-2][1], hull[-1][1]) <= _slope(hull[-2][1], option):
            hull.pop()
        hull.append((kind, option))
    return hull


def _slope(less: Option, more: Option) -> float:
    """Damage that each further byte avoids."""
    return (less.damage - more.damage) / (more.bytes - less.bytes)


def _combinations(large: list[str], hulls: Mapping[str, list[_Step[K]]]) -> Iterator[dict[str, _Step[K]]]:
    kept: list[str] = []
    tries = 1
    for name in sorted(large, key=lambda name: -hulls[name][-1][1].bytes):
        tries *= len(hulls[name])
        if tries > TRIES:
            break
        kept.append(name)
    for steps in product(*(hulls[name] for name in kept)):
        yield dict(zip(kept, steps, strict=True))


def _greedy(hulls: Mapping[str, list[_Step[K]]], budget: int) -> tuple[float, dict[str, K]] | None:
    """(damage, types): from the smallest types upwards, the step that avoids most damage per byte first; steps that no
    longer fit are passed over."""
    at = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0][1].bytes for hull in hulls.values())
    if left < 0:
        return None
    order = {name: number for number, name in enumerate(hulls)}
    heap: list[tuple[float, int, str]] = []

    def push(name: str) -> None:
        hull, step = hulls[name], at[name]
        if step + 1 < len(hull):
            heapq.heappush(heap, (-_slope(hull[step][1], hull[step + 1][1]), order[name], name))

    for name in hulls:
        push(name)
    while heap:
        _, _, name = heapq.heappop(heap)
        hull, step = hulls[name], at[name]
        more = hull[step + 1][1].bytes - hull[step][1].bytes
        if more <= left:
            left -= more
            at[name] += 1
            push(name)
    chosen = {name: hulls[name][step] for name, step in at.items()}
    return sum(option.damage for _, option in chosen.values()), {name: kind for name, (kind, _) in chosen.items()}
