"""Suggestions for misspelt names: one rule for recipes, options and choices."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import SequenceMatcher


def similar(name: str, known: Iterable[str], *, least: float = 0.6, given: Collection[str] = ()) -> list[str]:
    """The known names that are like another, the nearest first; case does not matter.

    `least` is how like, from 0 to 1 (the same). Of two equally near, one that was not `given` as well comes first.
    """
    likeness = {each: SequenceMatcher(None, each.lower(), name.lower()).ratio() for each in known}
    near = [each for each in likeness if likeness[each] >= least]
    return sorted(near, key=lambda each: (-likeness[each], each in given, each))


def nearest(name: str, known: Iterable[str], given: Collection[str] = ()) -> str | None:
    """The known name that is most like another; None if none is near."""
    return next(iter(similar(name, known, given=given)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as the end of a message, "; did you mean 'x'?"; nothing if none is near."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""
