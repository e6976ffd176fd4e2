"""`down_proj` of the block before the gap, fitted anew on what it is given; the stream may change its scale.

Where linear.py puts a map behind `down_proj`, which sees its output only, the whole matrix W is fitted here: it
minimises Σ ‖a·W + s·r − z‖² / ‖z‖² over tokens, a being what `down_proj` is given, shrunk towards the W that was there.
Each token's error is weighed by its own length: blocks normalise what they read, and a few tokens have streams a
hundred times as long as the others. Norms do not see the scale s of the stream, so it costs nothing to divide by it:
the blocks behind the gap add 1/s as much instead. In families that normalise what the MLP adds (Gemma-3), a scale per
channel takes W's place.
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
        """The matrix and the scale whose ridge held-out rows prefer."""
        from ..least_squares import Sums, choose

        decoder = gap.decoder
        full = decoder.can_fuse_after_mlp
        down: Any = decoder.down_proj(gap.block)
        bias = down.bias.detach().double() if full and down.bias is not None else None
        features = down.in_features if full else decoder.hidden_size
        sums = [Sums.empty(features, decoder.hidden_size, down.weight.device, diagonal=not full) for _ in range(2)]
        for tokens in gap.rows():
            # A bias stays as it is: it is part of what the features are added to.
            residual = tokens.residual.double() if bias is None else tokens.residual.double() + bias
            weight = 1 / tokens.target.double().norm(dim=-1)
            sums[tokens.held].add(tokens.inner if full else tokens.mlp, residual, tokens.target, weight)
        prior = down.weight.detach().double().T if full else gap.identity
        found = choose(sums, self.ridge, prior, prior, scaled=self.scale)
        values = gap.rescaled(found.scale) if found.scale != 1.0 else {}
        if full:
            values[down.weight] = found.solution.T / found.scale
        else:
            values |= decoder.fused(gap.block, found.solution / found.scale)
        return values, gap.record(found, found.scale)
