"""What of the machine this process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """Processor cores this process may run on: fewer than the machine has under taskset, a batch system or a container
    that is pinned to some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows
