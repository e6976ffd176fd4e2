"""The scale-and-rotation patch of LinearPatch (arXiv 2505.24680), fused into the model.

The patch P = Q·diag(d)·Qᵀ is multiplied to the stream h at the gap: Q is a Hadamard matrix, in whose basis the few
huge channels are spread out, and d is how much longer each of its channels is behind the gap than before it. The paper
keeps P as a matrix of its own between two blocks, which no stock runtime has a place for. Here P = s·(P/s) with s the
mean of d: the scale s is exact and free (norms do not see it: the blocks behind the gap add 1/s as much), and the map T
behind the MLP is fitted so that u·T + r comes closest to h·P/s. What is missed by that is recorded as the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...records.importance import Healing
from ..config import PatchHeal
from .hadamard import hadamard
from .least_squares import choose
from .linear import empty_sums, identity
from .stream import Gap, Values


def fit(gap: Gap, config: PatchHeal) -> tuple[Values, Healing]:
    """Two passes: the patch, and what of it can be fused behind the MLP."""
    decoder = gap.decoder
    patch = patch_matrix(gap)
    scale = float(patch.diagonal().mean())
    sums = empty_sums(gap)
    for tokens in gap.rows():
        stream = tokens.residual.double() + tokens.mlp.double()
        sums[tokens.held].add(tokens.mlp, tokens.residual, stream @ patch / scale)
    same = identity(gap)
    found = choose(sums, config.ridge, same, same)
    values: Values = {}
    for block in gap.downstream:
        values |= decoder.rescaled(block, 1 / scale)
    values |= decoder.fused(gap.block, found.solution)
    record = Healing(gap.block, (gap.first, gap.last), found.ridge, found.errors, found.unhealed, found.tokens, scale)
    return values, record


def patch_matrix(gap: Gap) -> Tensor:
    """P, (H, H) float64: the ratio of mean magnitudes behind and before the gap, channel by channel of the basis Q."""
    basis = hadamard(gap.decoder.hidden_size).to(gap.decoder.model.device)
    before = torch.zeros(len(basis), dtype=torch.float64, device=basis.device)
    behind = torch.zeros_like(before)
    for tokens in gap.rows():
        before += ((tokens.residual.double() + tokens.mlp.double()) @ basis).abs().sum(0)
        behind += (tokens.target.double() @ basis).abs().sum(0)
    ratio = torch.where(before > 0, behind / before.clamp_min(1e-300), torch.ones_like(before))
    return (basis * ratio) @ basis.T
