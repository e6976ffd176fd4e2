"""A least-squares map that bridges the gap, applied to the MLP before it (ReplaceMe, arXiv 2505.02819).

Let u be that MLP's output, r the residual stream it is added to and z the unpruned model's stream after the gap. T
minimises ‖u·T − (z − r)‖² and is multiplied into `down_proj`. In families that normalise the MLP's output (Gemma-3), T
is a scale per channel, multiplied into that norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from . import LeastSquares

if TYPE_CHECKING:
    from ...records.importance import Healing
    from ..stream import Gap, Values


class LinearHeal(LeastSquares):
    """A least-squares map over the gap, fused into the preceding `down_proj` (ReplaceMe, arXiv 2505.02819)."""

    kind: Literal["linear"] = "linear"
    toward: Literal["zero", "identity"] = Field(
        default="identity",
        description="what the ridge shrinks the map towards: zero (as published) or leaving the MLP as is",
    )

    def fit(self, gap: Gap) -> tuple[Values, Healing]:
        """The map with the best ridge on the held-out rows, shrunk towards the identity or towards zero."""
        from ..least_squares import choose

        sums, same = gap.sums(), gap.identity
        for tokens in gap.rows():
            sums[tokens.held].add(tokens.mlp, tokens.residual, tokens.target)
        toward = same if self.toward == "identity" else same.new_zeros(same.shape)
        choice = choose(sums, self.ridge, toward, same)
        return gap.decoder.fused(gap.block, choice.solution), gap.record(choice)
