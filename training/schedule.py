"""The learning rate of training loops of our own; transformers' Trainer has its own schedules."""

from __future__ import annotations

import math


def warmed_cosine(step: int, steps: int, warmup: float) -> float:
    """The share of the peak rate at step `step`, from 1 to `steps`: a linear rise over the first `warmup` (a share of
    the steps), then a cosine towards zero."""
    rising = math.ceil(warmup * steps)
    rest = max(0, step - 1 - rising) / max(1, steps - rising)
    return min(1.0, step / max(1, rising)) * 0.5 * (1 + math.cos(math.pi * rest))
