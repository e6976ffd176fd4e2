"""How a prompt is read in steps: in chunks with an eviction after each, then its last tokens, which all stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .settings import KvBudget

Read = TypeVar("Read")


@dataclass(frozen=True)
class Step:
    """Tokens `start` to `end` of a prompt, read in one forward pass; none where `start` is `end`."""

    start: int
    end: int
    evicts: bool  # afterwards
    protected: int = 0  # newest entries that stay


def steps(length: int, settings: KvBudget, held: int = 0) -> list[Step]:
    """How a prompt of `length` tokens is read behind the `held` entries of the text before it."""
    body = max(0, length - settings.local)
    evicts = settings.budget is not None
    plan = []
    if settings.budget is not None and held + length - body > settings.budget + settings.local:
        # Answers were written since the last eviction: short turns alone must not let the cache grow.
        plan.append(Step(0, 0, True, settings.stabilizers if body else 0))
    for start in range(0, body, settings.chunk):
        end = min(start + settings.chunk, body)
        plan.append(Step(start, end, evicts, settings.stabilizers if end < body else 0))
    return [*plan, Step(body, length, False)] if body < length else plan


def read_in_steps(
    ids: Sequence[int], plan: Iterable[Step], read: Callable[[Sequence[int]], Read], evict: Callable[[int], None]
) -> Read:
    """Read a prompt as planned; what `read` gave of its last tokens. `evict` is told how many of the newest entries are
    protected. `ValueError` if there is nothing to read."""
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
    """How many of their first steps all prompts have in common, at least the last of each left out."""
    plans = [steps(len(prompt), settings)[:-1] for prompt in prompts]
    count = 0
    for together in zip(*plans, strict=False):
        end = together[0].end
        if any(step != together[0] for step in together) or any(p[:end] != prompts[0][:end] for p in prompts):
            break
        count += 1
    return count


def most_held(settings: KvBudget, length: int, new: int = 0) -> int:
    """Entries held at most per KV head, with up to `new` tokens written after up to `length` of a prompt."""
    if settings.budget is None:
        return length + new
    reading = min(length, settings.budget + settings.chunk)
    writing = min(length, settings.budget + settings.local) + new
    if settings.evict_decoding:
        writing = min(writing, settings.budget + settings.local)
    return max(reading, writing)
