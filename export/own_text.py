"""Text that a checkpoint writes itself, to measure on where there are no rows."""

from __future__ import annotations

import torch

from ..core.stage import Advance
from ..data.calibration import pad_id
from ..data.chat import Encoded
from ..data.packing import Batch, pack
from ..modeling.types import CausalModel, ModelTokenizer

SIDE_BY_SIDE = 8  # texts that are written at once


@torch.no_grad()
def own_batches(
    model: CausalModel,
    tokenizer: ModelTokenizer,
    tokens: int,
    length: int,
    seed: int = 0,
    advance: Advance | None = None,
) -> list[Batch]:
    """About `tokens` tokens in texts of `length`, drawn from the model's own distribution, one text per batch."""
    random = torch.Generator().manual_seed(seed)
    first = tokenizer.bos_token_id
    first = pad_id(tokenizer) if first is None else first
    texts: list[list[int]] = []
    for start in range(0, max(1, tokens // length), SIDE_BY_SIDE):
        count = min(SIDE_BY_SIDE, max(1, tokens // length) - start)
        ids = torch.full((count, 1), first, dtype=torch.long)
        newest, past = ids, None
        while ids.shape[1] < length:
            output = model(input_ids=newest.to(model.device), past_key_values=past, use_cache=True)
            past = output.past_key_values
            chances = torch.softmax(output.logits[:, -1].float().cpu(), -1)
            newest = torch.multinomial(chances, 1, generator=random)
            ids = torch.cat([ids, newest], 1)
            if advance is not None:
                advance(count)
        texts += ids.tolist()
    rows = [Encoded(text, [True] * len(text), number, 0) for number, text in enumerate(texts)]
    return pack(rows, length, 1, pad_id(tokenizer))
