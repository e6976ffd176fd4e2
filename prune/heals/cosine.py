"""The map of heal/linear.py for the cosine objective of ReplaceMe (arXiv 2505.02819): Σ 1 − cos(u·T + r, z).

The paper runs Adam over stored activations. With y = u·T + r, the objective has the gradient of a weighted
least-squares problem, of weights cos(y, z)/‖y‖² and targets z·‖y‖/(‖z‖·cos(y, z)) that follow from the map so far: a
few rounds of least squares get there, in memory that does not grow with tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...records.importance import Healing
from . import LeastSquares

if TYPE_CHECKING:
    from torch import Tensor

    from ..stream import Gap, Tokens, Values

LEAST = 0.1  # a cosine below that is taken for it: the target would be out of sight


class CosineHeal(LeastSquares):
    """The same map for the cosine objective (ReplaceMe), by a few rounds of weighted least squares."""

    kind: Literal["cosine"] = "cosine"
    iterations: int = Field(default=4, ge=1, description="rounds, one pass each; the best one is kept")

    @property
    def rounds(self) -> int:
        return self.iterations + 1

    def fit(self, gap: Gap) -> tuple[Values, Healing]:
        """The best map, on held-out rows, of a few rounds that each start from the last."""
        from ..least_squares import choose

        same = gap.identity
        trial, transform, ridge = same, same, 0.0  # `trial` is of the rows to fit on alone: held-out rows judge it
        best = (float("inf"), transform, ridge)
        errors: dict[str, float] = {}
        for number in range(self.rounds):
            sums = gap.sums()
            missed, held = 0.0, 0
            for tokens in gap.rows():
                cosine, weight, target = problem(tokens, trial)
                if tokens.held:
                    missed, held = missed + float((1 - cosine).sum()), held + len(cosine)
                sums[tokens.held].add(tokens.mlp, tokens.residual, target, weight)
            errors[str(number)] = missed / max(held, 1)
            if errors[str(number)] < best[0]:
                best = (errors[str(number)], transform, ridge)
            if number == self.iterations:
                break
            found = choose(sums, self.ridge, same, same)
            trial, transform, ridge = sums[0].solve(found.ridge, same)[0], found.solution, found.ridge
        count = sums[0].tokens + sums[1].tokens
        record = Healing(gap.block, (gap.first, gap.last), best[2], errors, errors["0"], count)
        return gap.decoder.fused(gap.block, best[1]), record


def problem(tokens: Tokens, transform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines (N,) under the map so far, and weights (N,) and targets (N, H) of the least-squares problem there."""
    from torch.nn.functional import cosine_similarity, normalize

    from ..moments import apply_map

    z = tokens.target.double()
    y = apply_map(tokens.mlp.double(), transform) + tokens.residual.double()
    length = y.norm(dim=-1)
    cosine = cosine_similarity(y, z, dim=-1)
    safe = cosine.clamp_min(LEAST)
    return cosine, safe.sqrt() / length, normalize(z, dim=-1) * (length / safe)[:, None]
