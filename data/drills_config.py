"""Keys of drills: rows made from templates, with known answers."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from ..core.stage import Section

DrillKind = Literal["copying", "lookup", "successor", "arithmetic"]


class Drills(Section):
    """Rows whose answers need copying, retrieval or arithmetic, over the model's own vocabulary."""

    kinds: Annotated[list[DrillKind], Field(min_length=1)] = Field(
        default=list(get_args(DrillKind)),
        description="copying: a line again; lookup: entries of a table; successor: the word after another in a line; "
        "arithmetic: sums and differences of two-digit numbers; used in turn",
    )


class DrillsBeside(Drills):
    """Drills beside the rows of a source."""

    weight: float = Field(
        default=1.0, gt=0, description="its tokens to learn for each token to learn of the source's own rows"
    )
