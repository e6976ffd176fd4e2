"""Held-out metrics of whole checkpoints against the unpruned model, measured as recovery does during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.stage import Context
from ..data.packing import Batch
from ..modeling.agreement import Head, States, response_positions, token_terms
from ..modeling.blocks import Decoder
from ..modeling.load import load_model
from .cost import CHUNK


@torch.no_grad()
def unpruned(folder: Path, batches: Sequence[Batch], context: Context) -> list[States]:
    """The unpruned model's head, and its hidden states at the response positions of each batch. The model is run once
    and then freed."""
    decoder = Decoder(load_model(folder, context.dtype, context.device))
    head = Head(decoder.head_weight.detach().clone(), decoder.softcap)
    return [States(_response_states(decoder, batch.to(context.device))[0], head) for batch in batches]


@torch.no_grad()
def heldout_figures(
    folder: Path, batches: Sequence[Batch], reference: Sequence[States], context: Context
) -> dict[str, float]:
    """KL(unpruned ‖ model) in nats per response token, and perplexity on response tokens, of a checkpoint folder."""
    decoder = Decoder(load_model(folder, context.dtype, context.device))
    head, sums = Head(decoder.head_weight, decoder.softcap), torch.zeros(2, dtype=torch.float64)
    count = 0
    for batch, expected in zip(batches, reference, strict=True):
        hidden, targets = _response_states(decoder, batch.to(context.device))
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            terms = token_terms(head.logits(hidden[part]), targets[part], expected.at(part))
            sums += torch.stack([term.sum(dtype=torch.float64) for term in (terms.nll, terms.kl)]).cpu()
        count += len(targets)
    nll, kl = (sums / max(count, 1)).tolist()
    return {"eval_kl": kl, "eval_perplexity": math.exp(min(nll, 700.0)) if math.isfinite(nll) else math.inf}


def _response_states(decoder: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """(N, H) states after the final norm at the positions that predict response tokens, and these tokens (N,)."""
    positions, targets = response_positions(batch.input_ids, batch.loss_mask)
    return decoder.hidden(**batch.model_inputs()).flatten(0, 1)[positions].clone(), targets
