"""The map of heals/linear.py for the cosine objective of ReplaceMe (arXiv 2505.02819): Σ 1 − cos(u·T + r, z).

The paper runs Adam over stored activations. With y = u·T + r, the objective has the same gradient as a weighted
least-squares problem whose weights cos(y, z)/‖y‖² and targets z·‖y‖/(‖z‖·cos(y, z)) depend on the current map. A few
rounds of least squares therefore converge, in memory that does not grow with the number of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...records.importance import Healing
from . import LeastSquares

if TYPE_CHECKING:
    from torch import Tensor

    from ..stream import Gap, Tokens, Values

LEAST = 0.1  # lower cosines are clamped to this, because targets grow as 1/cos


class CosineHeal(LeastSquares):
    """The same map for the cosine objective (ReplaceMe), by a few rounds of weighted least squares."""

    kind: Literal["cosine"] = "cosine"
    iterations: int = Field(default=4, ge=1, description="rounds, one pass each; the best one is kept")

    @property
    def rounds(self) -> int:
        return self.iterations + 1

    def fit(self, gap: Gap) -> tuple[Values, Healing]:
        """The best of several rounds' maps on the held-out rows; each round starts from the last one's."""
        from ..least_squares import choose

        same = gap.identity
        trial, transform, ridge = same, same, 0.0  # `trial` is fitted without the held-out rows, which judge it
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
            choice = choose(sums, self.ridge, same, same)
            trial, transform, ridge = sums[0].solve(choice.ridge, same)[0], choice.solution, choice.ridge
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
