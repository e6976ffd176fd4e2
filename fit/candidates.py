"""What can be combined, and which combinations no other beats. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..runtime.artifact_types import ARTIFACT_TYPES, GGUF_CACHES, ONNX_CACHES

CACHES = {"llama.cpp": GGUF_CACHES, "onnx": ONNX_CACHES}  # of each engine, the whole one first
WHOLE_CACHES = tuple(whole for whole, _ in CACHES.values())
T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Combination:
    """A number of removed blocks, a mix of types, and how keys and values are held."""

    removed: int
    mix: str
    cache: str = WHOLE_CACHES[0]

    @property
    def plain(self) -> bool:
        """The unpruned model, as anybody would quantize it."""
        return self.removed == 0 and self.whole_cache and not self.sized

    @property
    def engine(self) -> str:
        """What runs it: each engine has caches of its own."""
        return next(engine for engine, caches in CACHES.items() if self.cache in caches)

    @property
    def whole_cache(self) -> bool:
        """Whether keys and values are not in 8 bits."""
        return self.cache in WHOLE_CACHES

    @property
    def sized(self) -> bool:
        """Whether its mix is a size, such as 80MB, for which every tensor gets a type of its own."""
        return self.mix not in ARTIFACT_TYPES

    @property
    def name(self) -> str:
        """As people read it; no two candidates share one."""
        words = [f"types for {self.mix}" if self.sized else self.mix]
        if self.removed:
            words.append(f"{self.removed} block{'' if self.removed == 1 else 's'} cut")
        if not self.whole_cache:
            words.append("8-bit cache")
        return ", ".join(words)


def combinations(removed: Iterable[int], mixes: Sequence[str], caches: Sequence[str]) -> list[Combination]:
    """Every cut in every mix with every cache; the unpruned model in every plain mix first."""
    found = [Combination(count, mix, cache) for count in removed for mix in mixes for cache in caches]
    return sorted(found, key=lambda c: (not c.plain, c.removed, caches.index(c.cache), mixes.index(c.mix)))


def front(items: Sequence[T], *values: Callable[[T], float]) -> list[T]:
    """The items that no other is at least as good as in all values and better in one; lower is better. Of items with
    the same values the first stays."""
    found: list[T] = []
    for number, item in enumerate(items):
        own = [value(item) for value in values]
        beaten = False
        for place, other in enumerate(items):
            theirs = [value(other) for value in values]
            same = own == theirs and place < number
            beaten = beaten or same or (theirs != own and all(a <= b for a, b in zip(theirs, own, strict=True)))
        if not beaten:
            found.append(item)
    return found
