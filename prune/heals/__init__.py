"""Heals: ways to close the gap that dropped blocks leave, one per file; the file's name is its name in the recipe.

A heal is a class with its options as fields and a function `fit`, which computes new values for parameters of kept
blocks, so that the residual stream after the gap is close to the unpruned model's. The architecture stays the same and
inference costs nothing extra. prune/stream.py supplies the data to fit on; prune/healing.py goes from gap to gap.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from ...core.registry import Method, Registry

if TYPE_CHECKING:
    from ...records.importance import Healing
    from ..stream import Gap, Values

HELD_OUT = 0.125  # share of the calibration rows


class Heal(Method):
    """Base of all heals."""

    @abstractmethod
    def fit(self, gap: Gap) -> tuple[Values, Healing]:
        """New values for parameters of kept blocks, and figures for the record; the model is left unchanged."""


class LeastSquares(Heal):
    """A heal fitted by ridge regression; the ridge is selected on held-out rows."""

    fits_down_proj: ClassVar[bool] = False  # the features are `down_proj`'s inputs instead of the MLP's outputs

    ridge: list[Annotated[float, Field(ge=0)]] = Field(
        default=[1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        min_length=1,
        description="candidate ridge strengths, as a share of the features' mean square; selected on held-out rows",
    )
    held_out: float = Field(
        default=HELD_OUT, gt=0, le=0.5, description="share of calibration rows held out to select the ridge"
    )

    @property
    def rounds(self) -> int:
        """Passes over the rows per gap."""
        return 1

    @property
    def solutions(self) -> int:
        """How often each round's sums are solved per ridge."""
        return 1


HEALS = Registry(__name__, Heal, "compress.heals", "heal", ("none", "linear", "cosine", "patch", "refit"))
