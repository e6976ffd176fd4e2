"""Ways to close the gap that dropped blocks leave, one per file; the file's name is its name in the recipe.

A heal is a class with its options as fields and a function `fit`: new values for parameters of kept blocks, so that the
residual stream behind the gap is what it was in the unpruned model. The healed model has the architecture it had, and
costs nothing more. prune/stream.py has what a gap gives to fit on; prune/healing.py goes from gap to gap.
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
        """New values for parameters of kept blocks, and what is to be told of them; the model is left as it is."""


class LeastSquares(Heal):
    """Fitted by ridge regression, the ridge chosen by held-out rows."""

    fits_down_proj: ClassVar[bool] = False  # the features are what `down_proj` is given, not what the MLP adds

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
        """How often the rows are gone through for each gap."""
        return 1

    @property
    def solutions(self) -> int:
        """How often the sums of one round are solved with each ridge."""
        return 1


HEALS = Registry(__name__, Heal, "compress.heals", "heal", ("none", "linear", "cosine", "patch", "refit"))
