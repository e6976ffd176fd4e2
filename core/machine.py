"""The processor cores that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = "GOMP_SPINCOUNT", "1000"  # a variable of GNU OpenMP's, and turns of its loop


def spin_briefly() -> None:
    """Let threads of libraries that this process loads from now on wait for each other without keeping a core busy.

    GNU OpenMP's spin for milliseconds at each of a graph's many barriers. With anything else running on the machine,
    that slows torch and llama.cpp on two cores down by a factor of 5 to 20. The setting is read once, on loading,
    and both load the same library.
    """
    os.environ.setdefault(*SPINS)


@contextmanager
def short_spins() -> Iterator[None]:
    """`spin_briefly` for what is loaded inside this context."""
    name, _ = SPINS
    before = os.environ.get(name)
    spin_briefly()
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


def cores() -> int:
    """Processor cores that this process may use: fewer than the machine has under taskset, in a batch system or in a
    container that is pinned to some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows


def threads_of(asked: int) -> int:
    """The number of threads to give a runtime that would count the whole machine's cores: what the user asked for, else
    the cores that this process is limited to, else 0 (the runtime's choice)."""
    held = cores()
    return asked or (held if held < (os.cpu_count() or 1) else 0)
