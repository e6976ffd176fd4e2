"""Which blocks to drop, one way to choose per file; the file's name is its name in the recipe.

A search is a function `choose(study, config, count, candidates) -> Cut`: `count` blocks within `candidates`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ...core.errors import UserError
from ..config import PruneConfig
from ..cuts import Cut

if TYPE_CHECKING:
    from ..study import Study


def choose(study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
    """The blocks to drop, by the recipe's search. Raises `UserError` where fewer can go."""
    if count > len(candidates):
        where = f" (blocks {candidates.start} to {candidates.stop - 1})" if candidates else ""
        raise UserError(f"prune.blocks is {count}, but only {len(candidates)} blocks can go{where}; lower prune.blocks")
    if count == 0:
        return ()
    return importlib.import_module(f".{config.search.kind}", __package__).choose(study, config, count, candidates)
