"""Returning freed memory to the system between the steps of a long run."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back_memory() -> None:
    """Collect garbage and return freed memory to the system.

    glibc keeps what is freed between blocks still in use, here hundreds of megabytes of key-value caches, and what
    comes next would have them on top of its own.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc; other C libraries give back by themselves or not at all
        trim(0)
