"""First-order Taylor importance: the estimated change of the loss if a block's weights became zero.

Σ |∂L/∂w · w| over a block's weights, L the next-token loss summed over the scoring rows (LLM-Pruner, arXiv
2305.11627; per block: Shortened LLaMA, arXiv 2402.02834). A window's importance is the sum over its blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import Metric

if TYPE_CHECKING:
    from ..study import Study


class Taylor(Metric):
    """Gradient × weight, summed over a block (arXiv 2402.02834)."""

    kind: Literal["taylor"] = "taylor"

    def windows(self, study: Study, length: int) -> list[float]:
        """Sums over each run of `length` blocks."""
        single = study.remember("taylor", lambda: block_sums(study))
        return [sum(single[first : first + length]) for first in range(len(single) - length + 1)]


def block_sums(study: Study) -> list[float]:
    """Σ |gradient · weight| of every block; the model's weights and flags are unchanged."""
    import torch

    from ..scoring import CHUNK, next_tokens

    decoder = study.decoder
    parameters = list(decoder.model.parameters())
    trained = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    for parameter in decoder.blocks.parameters():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), study.progress.bar("taylor", sum(b.tokens for b in study.scoring)) as advance:
            for batch in study.scoring:
                batch = batch.to(decoder.model.device)
                hidden = decoder.hidden(**batch.model_inputs())
                leaf = hidden.detach().requires_grad_()
                # Logits in chunks, never for a whole batch; then a single backward pass through the blocks.
                for part in zip(*(index.split(CHUNK) for index in next_tokens(batch)), strict=True):
                    logits = decoder.head(leaf[part]).float()
                    targets = batch.input_ids[part[0], part[1] + 1]
                    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
                hidden.backward(leaf.grad)
                advance(batch.tokens)
        with torch.no_grad():
            return [
                float(sum((p.grad.float() * p.float()).abs().sum() for p in block.parameters() if p.grad is not None))
                for block in decoder.blocks
            ]
    finally:
        for parameter, flag in zip(parameters, trained, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)
