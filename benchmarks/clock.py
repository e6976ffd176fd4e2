"""Wall time and processor time; where the two disagree, other work was on the machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Took:
    """Seconds on the wall, and seconds of all of the process's threads together."""

    wall: float
    cpu: float


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Took]:
    """What a call gave, and how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return result, Took(time.perf_counter() - wall, time.process_time() - cpu)
