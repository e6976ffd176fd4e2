"""Suggestions for misspelt names: one rule for recipes, options and choices."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import SequenceMatcher


def similar(name: str, known: Iterable[str], *, least: float = 0.6, given: Collection[str] = ()) -> list[str]:
    """The known names that are similar to `name`, nearest first; case is ignored.

    `least` is the minimum similarity, from 0 to 1 (equal). Of two equally similar ones, one not in `given` comes first.
    """
    likeness = {each: SequenceMatcher(None, each.lower(), name.lower()).ratio() for each in known}
    near = [each for each in likeness if likeness[each] >= least]
    return sorted(near, key=lambda each: (-likeness[each], each in given, each))


def nearest(name: str, known: Iterable[str], given: Collection[str] = ()) -> str | None:
    """The most similar known name; None if none is near."""
    return next(iter(similar(name, known, given=given)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as the end of a message, "; did you mean 'x'?"; nothing if none is near."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""
