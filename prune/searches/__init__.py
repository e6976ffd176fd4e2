"""Searches: ways to choose the blocks to drop, one per file; the file's name is its name in the recipe.

A search is a class with its options as fields and a function `choose`. It receives the study (prune/study.py), which
has the unpruned model, the rows and all measurements.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...core.errors import UserError
from ...core.registry import Method, Registry

if TYPE_CHECKING:
    from ...modeling.cuts import Cut
    from ..config import PruneConfig
    from ..study import Study


class Search(Method):
    """Base of all searches."""

    @abstractmethod
    def choose(self, study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
        """`count` ≥ 1 blocks to drop, all within `candidates`, of which there are at least `count`."""


class Scored(Search):
    """A search that scores cuts on the scoring rows."""

    score: Literal["kl", "perplexity"] = Field(
        default="kl", description="a cut's score: KL(unpruned ‖ cut), or the perplexity of the rows"
    )
    healed: bool | None = Field(
        default=None, description="score cuts healed by a linear map; null: if the recipe heals at all"
    )
    copying: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the scoring rows in which a text is repeated, so that cuts which can no longer "
        "copy from the context score worse",
    )
    guard: bool = Field(
        default=True,
        description="use the angular window or the lowest influence instead if it scores better on held-out rows",
    )


def choose(study: Study, config: PruneConfig, count: int, candidates: range) -> Cut:
    """The blocks to drop, by the recipe's search. Raises `UserError` if there are too few candidates."""
    if count > len(candidates):
        where = f" (blocks {candidates.start} to {candidates.stop - 1})" if candidates else ""
        raise UserError(
            f"prune.blocks is {count}, but only {len(candidates)} blocks can be removed{where}; lower prune.blocks"
        )
    return config.search.choose(study, config, count, candidates) if count else ()


SEARCHES = Registry(__name__, Search, "compress.searches", "search", ("window", "lowest", "greedy", "beam"))
