"""The scale-and-rotation patch of LinearPatch (arXiv 2505.24680), fused into the model.

The stream h at the gap is multiplied by the patch P = Q·diag(d)·Qᵀ. Q is a Hadamard matrix, whose basis spreads out the
few huge channels, and d is the ratio of each channel's magnitude after the gap to that before it. The paper keeps P as
a separate matrix between two blocks, which no stock runtime supports. Here P = s·(P/s), where s is the mean of d: the
scale s is exact and free (norms cancel it, if the blocks after the gap add 1/s as much), and the map T after the MLP is
fitted so that u·T + r is closest to h·P/s. The residual of that fit is recorded as the error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import LeastSquares

if TYPE_CHECKING:
    from torch import Tensor

    from ...records.importance import Healing
    from ..stream import Gap, Values


class PatchHeal(LeastSquares):
    """A scale per channel in a rotated basis, fused as far as it can be (LinearPatch, arXiv 2505.24680)."""

    kind: Literal["patch"] = "patch"

    def fit(self, gap: Gap) -> tuple[Values, Healing]:
        """Two passes: one for the patch, one for the map after the MLP that comes closest to it."""
        from ..least_squares import choose

        patch = patch_matrix(gap)
        scale = float(patch.diagonal().mean())
        sums, same = gap.sums(), gap.identity
        for tokens in gap.rows():
            stream = tokens.residual.double() + tokens.mlp.double()
            sums[tokens.held].add(tokens.mlp, tokens.residual, stream @ patch / scale)
        choice = choose(sums, self.ridge, same, same)
        values = gap.rescaled(scale) | gap.decoder.fused(gap.block, choice.solution)
        return values, gap.record(choice, scale)


def patch_matrix(gap: Gap) -> Tensor:
    """P, (H, H) float64: the ratio of mean magnitudes after and before the gap, per channel of the basis Q."""
    import torch

    from ..hadamard import hadamard

    basis = hadamard(gap.decoder.hidden_size).to(gap.decoder.model.device)
    before = torch.zeros(len(basis), dtype=torch.float64, device=basis.device)
    behind = torch.zeros_like(before)
    for tokens in gap.rows():
        before += ((tokens.residual.double() + tokens.mlp.double()) @ basis).abs().sum(0)
        behind += (tokens.target.double() @ basis).abs().sum(0)
    ratio = torch.where(before > 0, behind / before.clamp_min(1e-300), torch.ones_like(before))
    return (basis * ratio) @ basis.T
