"""The processor cores that this process may use."""

from __future__ import annotations

import os


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
