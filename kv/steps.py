"""Plans how a prompt is read: in chunks with an eviction after each, then its last tokens, which all stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .settings import KvBudget

Read = TypeVar("Read")


@dataclass(frozen=True)
class Step:
    """Tokens `start` to `end` of a prompt, read in one forward pass; nothing is read if they are equal."""

    start: int
    end: int
    evicts: bool  # afterwards
    protected: int = 0  # newest entries that stay


def steps(length: int, settings: KvBudget, held: int = 0) -> list[Step]:
    """The steps for a prompt of `length` tokens that follows `held` entries of earlier text."""
    body = max(0, length - settings.local)
    evicts = settings.budget is not None
    plan = []
    if settings.budget is not None and held + length - body > settings.budget + settings.local:
        # Tokens were generated since the last eviction, and a series of short turns must not let the cache grow.
        plan.append(Step(0, 0, True, settings.stabilizers if body else 0))
    for start in range(0, body, settings.chunk):
        end = min(start + settings.chunk, body)
        plan.append(Step(start, end, evicts, settings.stabilizers if end < body else 0))
    return [*plan, Step(body, length, False)] if body < length else plan


def read_in_steps(
    ids: Sequence[int], plan: Iterable[Step], read: Callable[[Sequence[int]], Read], evict: Callable[[int], None]
) -> Read:
    """Read a prompt as planned; returns what `read` returned for its last tokens. `evict` gets the number of newest
    entries that are protected. `ValueError` if there is nothing to read."""
    last: list[Read] = []
    for step in plan:
        if step.start < step.end:
            last = [read(ids[step.start : step.end])]
        if step.evicts:
            evict(step.protected)
    if not last:
        raise ValueError("there is nothing to read")
    return last[0]


def shared_steps(prompts: Sequence[Sequence[int]], settings: KvBudget) -> int:
    """How many first steps all prompts have in common, excluding at least the last of each."""
    plans = [steps(len(prompt), settings)[:-1] for prompt in prompts]
    count = 0
    for together in zip(*plans, strict=False):
        end = together[0].end
        if any(step != together[0] for step in together) or any(p[:end] != prompts[0][:end] for p in prompts):
            break
        count += 1
    return count


def most_held(settings: KvBudget, length: int, new: int = 0) -> int:
    """The most entries held per KV head, for a prompt of up to `length` tokens and up to `new` generated ones."""
    if settings.budget is None:
        return length + new
    reading = min(length, settings.budget + settings.chunk)
    writing = min(length, settings.budget + settings.local) + new
    if settings.evict_decoding:
        writing = min(writing, settings.budget + settings.local)
    return max(reading, writing)
