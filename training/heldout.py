"""How a student stands on held-out rows: likelihood, and KL to the unpruned model, per response token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.packing import Batch
from ..modeling.agreement import Anchor, Head, response_positions, token_terms
from ..modeling.blocks import Decoder


def response_states(decoder: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """(N, H) states after the final norm at the positions that predict response tokens, and these tokens (N,)."""
    positions, targets = response_positions(batch.input_ids, batch.loss_mask)
    return decoder.hidden(**batch.model_inputs()).flatten(0, 1)[positions].clone(), targets


@torch.no_grad()
def mean_terms(
    decoder: Decoder, batches: Sequence[Batch], anchors: Sequence[Anchor], chunk: int
) -> tuple[float, float]:
    """Mean negative log-likelihood and mean KL(unpruned ‖ model) in nats per response token.

    `anchors` are the unpruned model's distributions at the response positions of each batch; the logits of `chunk`
    positions exist at once.
    """
    head, sums, count = Head(decoder.head_weight, decoder.softcap), torch.zeros(2, dtype=torch.float64), 0
    for batch, anchor in zip(batches, anchors, strict=True):
        hidden, targets = response_states(decoder, batch.to(decoder.model.device))
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            terms = token_terms(head.logits(hidden[part]), targets[part], anchor.at(part))
            sums += torch.stack([term.sum(dtype=torch.float64) for term in (terms.nll, terms.kl)]).cpu()
        count += len(targets)
    nll, kl = (sums / max(count, 1)).tolist()
    return nll, kl
