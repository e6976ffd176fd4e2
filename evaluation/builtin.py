"""Generative tasks that need no data: made from a fixed seed, the same on every machine.

Both show an example or two first, so that a small model sees what is wanted; row i is the same for any number of rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .generation import Exercise

ROWS = 64  # without a limit
_WORDS = (
    "apple river stone cloud garden window paper silver winter table horse lemon music ocean pencil rabbit school "
    "tiger bridge candle desert engine forest guitar hammer island jacket kitchen ladder market needle orange "
    "pepper queen road saddle tower valley wagon yellow"
).split()


def copy(draw: random.Random) -> Exercise:
    """Repeat four words."""
    first, second, asked = (" ".join(draw.sample(_WORDS, 4)) for _ in range(3))
    lines = (f"Words: {first}\nCopy: {first}", f"Words: {second}\nCopy: {second}", f"Words: {asked}\nCopy:")
    return Exercise("Copy the words.\n\n" + "\n\n".join(lines), asked)


def addition(draw: random.Random) -> Exercise:
    """Add two numbers below 20."""
    pairs = [(draw.randint(1, 19), draw.randint(1, 19)) for _ in range(3)]
    lines = [f"{a} + {b} = {a + b}" for a, b in pairs[:-1]]
    a, b = pairs[-1]
    return Exercise("\n".join(["Add the numbers.", *lines, f"{a} + {b} ="]), str(a + b))


MAKERS: dict[str, Callable[[random.Random], Exercise]] = {"builtin:addition": addition, "builtin:copy": copy}


def exercises(task: str, limit: int | None) -> list[Exercise]:
    """The first `limit` rows of a built-in task."""
    return [MAKERS[task](random.Random(f"{task}/{row}")) for row in range(ROWS if limit is None else limit)]
