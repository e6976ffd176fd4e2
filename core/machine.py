"""The processor cores that this process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """Processor cores this process may run on: fewer than the machine has under taskset, a batch system or a container
    that is pinned to some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows


def threads_of(asked: int) -> int:
    """The threads to ask a runtime for that chooses a number by the whole machine: what the user asked for, the cores
    this process is held to, or 0, its own choice, where it is held to none."""
    held = cores()
    return asked or (held if held < (os.cpu_count() or 1) else 0)
