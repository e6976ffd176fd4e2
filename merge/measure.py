"""Held-out metrics of whole checkpoints against the unpruned model, measured as recovery does during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ..core.stage import Context
from ..data.packing import Batch
from ..modeling.agreement import Head, States
from ..modeling.blocks import Decoder
from ..modeling.load import load_model
from ..training.heldout import mean_terms, response_states
from .cost import CHUNK


@torch.no_grad()
def unpruned(folder: Path, batches: Sequence[Batch], context: Context) -> list[States]:
    """The unpruned model's head, and its hidden states at the response positions of each batch. The model is run once
    and then freed."""
    decoder = Decoder(load_model(folder, context.dtype, context.device))
    head = Head(decoder.head_weight.detach().clone(), decoder.softcap)
    return [States(response_states(decoder, batch.to(context.device))[0], head) for batch in batches]


@torch.no_grad()
def heldout_figures(
    folder: Path, batches: Sequence[Batch], reference: Sequence[States], context: Context
) -> dict[str, float]:
    """KL(unpruned ‖ model) in nats per response token, and perplexity on response tokens, of a checkpoint folder."""
    decoder = Decoder(load_model(folder, context.dtype, context.device))
    nll, kl = mean_terms(decoder, batches, reference, CHUNK)
    return {"eval_kl": kl, "eval_perplexity": math.exp(min(nll, 700.0)) if math.isfinite(nll) else math.inf}
