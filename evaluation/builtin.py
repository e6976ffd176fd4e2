"""Built-in generative tasks: generated from a fixed seed, the same on every machine.

Each prompt has three examples as earlier turns of the conversation: with them SmolLM2-135M-Instruct copies and adds
nearly everything right, without them it does neither. Row i is the same for any number of rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .cost import BUILTIN_ROWS
from .generation import Exercise

EXAMPLES = 3
_WORDS = (
    "apple river stone cloud garden window paper silver winter table horse lemon music ocean pencil rabbit school "
    "tiger bridge candle desert engine forest guitar hammer island jacket kitchen ladder market needle orange "
    "pepper queen road saddle tower valley wagon yellow"
).split()


def copy(draw: random.Random) -> Exercise:
    """Repeat four words."""
    texts = [" ".join(draw.sample(_WORDS, 4)) for _ in range(EXAMPLES + 1)]
    *examples, asked = ((f"Repeat: {text}", text) for text in texts)
    return Exercise(*asked, tuple(examples))


def addition(draw: random.Random) -> Exercise:
    """Add two numbers below 10."""
    pairs = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(EXAMPLES + 1)]
    *examples, (prompt, _) = ((f"What is {a} + {b}?", f"{a} + {b} = {a + b}") for a, b in pairs)
    return Exercise(prompt, str(sum(pairs[-1])), tuple(examples))


MAKERS: dict[str, Callable[[random.Random], Exercise]] = {"builtin:addition": addition, "builtin:copy": copy}


def exercises(task: str, limit: int | None) -> list[Exercise]:
    """The first `limit` rows of a built-in task."""
    return [MAKERS[task](random.Random(f"{task}/{row}")) for row in range(BUILTIN_ROWS if limit is None else limit)]
