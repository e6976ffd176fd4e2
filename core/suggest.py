"""What was probably meant by a misspelt name: one rule for recipes, options and choices."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like another; None if none is near. Case does not matter."""
    folded = {each.lower(): each for each in known}
    near = get_close_matches(name.lower(), folded, n=1)
    return folded[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as the end of a message, "; did you mean 'x'?"; nothing if none is near."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""
