"""What dropping blocks costs, one metric per file; the file's name is the metric's name in the recipe.

A metric is a function `windows(study, length) -> list[float]`: for each run of `length` adjacent blocks, by its first
block, how much is lost without it. Higher is worse; values of different metrics cannot be compared.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..study import Study


def windows(name: str, study: Study, length: int) -> list[float]:
    """The metric of that name for all windows of `length` blocks: L − length + 1 values."""
    return importlib.import_module(f".{name}", __package__).windows(study, length)
