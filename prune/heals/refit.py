"""Refits `down_proj` of the block before the gap on its inputs; the stream's scale may change.

linear.py fits a map of `down_proj`'s output; here the whole matrix W is fitted. It minimises
Σ ‖a·W + s·r − z‖² / ‖z‖² over tokens, a being `down_proj`'s input, and is shrunk towards the original W. Errors are
relative to the stream's norm, because blocks normalise their input and a few tokens have streams a hundred times as
long as the others. The scale s costs nothing: norms cancel it, and the blocks after the gap add 1/s as much. In
families that normalise the MLP's output (Gemma-3), a scale per channel takes W's place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from . import LeastSquares

if TYPE_CHECKING:
    from ...records.importance import Healing
    from ..stream import Gap, Values


class RefitHeal(LeastSquares):
    """The preceding `down_proj` refitted on its inputs, each token's error weighted by its length."""

    kind: Literal["refit"] = "refit"
    fits_down_proj: ClassVar[bool] = True
    scale: bool = Field(default=True, description="let the stream behind the gap change its scale, which is free")

    @property
    def solutions(self) -> int:
        return 2 if self.scale else 1

    def fit(self, gap: Gap) -> tuple[Values, Healing]:
        """The matrix and the scale with the best ridge on the held-out rows."""
        from ..least_squares import Sums, choose

        decoder = gap.decoder
        full = decoder.can_fuse_after_mlp
        down: Any = decoder.down_proj(gap.block)
        bias = down.bias.detach().double() if full and down.bias is not None else None
        features = down.in_features if full else decoder.hidden_size
        sums = [Sums.empty(features, decoder.hidden_size, down.weight.device, diagonal=not full) for _ in range(2)]
        for tokens in gap.rows():
            # A bias stays: it counts as part of the residual that the features are added to.
            residual = tokens.residual.double() if bias is None else tokens.residual.double() + bias
            weight = 1 / tokens.target.double().norm(dim=-1)
            sums[tokens.held].add(tokens.inner if full else tokens.mlp, residual, tokens.target, weight)
        prior = down.weight.detach().double().T if full else gap.identity
        choice = choose(sums, self.ridge, prior, prior, scaled=self.scale)
        values = gap.rescaled(choice.scale) if choice.scale != 1.0 else {}
        if full:
            values[down.weight] = choice.solution.T / choice.scale
        else:
            values |= decoder.fused(gap.block, choice.solution / choice.scale)
        return values, gap.record(choice, choice.scale)
