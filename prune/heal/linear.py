"""A least-squares map over the gap, behind the MLP of the block before it (ReplaceMe, arXiv 2505.02819).

With u what that MLP adds, r the residual stream it is added to and z the unpruned model's stream behind the gap, T
minimises ‖u·T − (z − r)‖² and is multiplied into `down_proj`. In families that normalise what the MLP adds (Gemma-3),
T is a scale per channel, multiplied into that norm.
"""

from __future__ import annotations

import torch

from ...records.importance import Healing
from ..config import LinearHeal
from .least_squares import Sums, choose
from .stream import Gap, Values


def fit(gap: Gap, config: LinearHeal) -> tuple[Values, Healing]:
    """The map whose ridge held-out rows prefer, shrunk towards the identity or towards zero."""
    decoder = gap.decoder
    sums = empty_sums(gap)
    for tokens in gap.rows():
        sums[tokens.held].add(tokens.mlp, tokens.residual, tokens.target)
    same = identity(gap)
    toward = same if config.toward == "identity" else torch.zeros_like(same)
    found = choose(sums, config.ridge, toward, same)
    record = Healing(gap.block, (gap.first, gap.last), found.ridge, found.errors, found.unhealed, found.tokens)
    return decoder.fused(gap.block, found.solution), record


def empty_sums(gap: Gap) -> list[Sums]:
    """For a map behind the MLP: sums of the rows to fit on, and of the held-out ones."""
    size, full = gap.decoder.hidden_size, gap.decoder.can_fuse_after_mlp
    return [Sums.empty(size, size, gap.decoder.model.device, diagonal=not full) for _ in range(2)]


def identity(gap: Gap) -> torch.Tensor:
    """The map that changes nothing: (H, H), or (H,) where only a scale per channel can be fused."""
    ones = torch.ones(gap.decoder.hidden_size, dtype=torch.float64, device=gap.decoder.model.device)
    return ones.diag() if gap.decoder.can_fuse_after_mlp else ones
