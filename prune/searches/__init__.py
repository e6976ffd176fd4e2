"""Ways to choose which blocks to drop, one per file; the file's name is its name in the recipe.

A search is a class with its options as fields and a function `choose`. It is given the study (prune/study.py): the
unpruned model, the rows, and what was measured.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...core.errors import UserError
from ...core.registry import Method, Registry

if TYPE_CHECKING:
    from ..config import PruneConfig
    from ..cuts import Cut
    from ..study import Study


class Search(Method):
    """Base of all searches."""

    @abstractmethod
    def choose(self, study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
        """`count` blocks to drop, all within `candidates`; there are at least so many, and `count` is at least 1."""


class Scored(Search):
    """Cuts are scored on the scoring rows."""

    score: Literal["kl", "perplexity"] = Field(
        default="kl", description="what a cut is scored by: KL(unpruned ‖ cut), or the perplexity of the rows"
    )
    healed: bool | None = Field(
        default=None, description="score cuts as linear healing would leave them; null: if the recipe heals at all"
    )
    copying: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the scoring rows in which a text is repeated, so that cuts which can no longer "
        "copy from the context score worse",
    )
    guard: bool = Field(
        default=True, description="take the angular window or the lowest influence where held-out rows find it better"
    )


def choose(study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
    """The blocks to drop, by the recipe's search. Raises `UserError` where fewer can go."""
    if count > len(candidates):
        where = f" (blocks {candidates.start} to {candidates.stop - 1})" if candidates else ""
        raise UserError(f"prune.blocks is {count}, but only {len(candidates)} blocks can go{where}; lower prune.blocks")
    return config.search.choose(study, config, count, candidates) if count else ()


SEARCHES = Registry(__name__, Search, "compress.searches", "search", ("window", "lowest", "greedy", "beam"))
