"""Returning freed memory to the system between the steps of a long run."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back_memory() -> None:
    """Collect garbage and return freed memory to the system.

    glibc keeps freed memory that lies between blocks still in use, here hundreds of megabytes of key-value caches,
    which would add to the next step's memory.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc; other C libraries return memory by themselves or not at all
        trim(0)
