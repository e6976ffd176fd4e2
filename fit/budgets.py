"""What a KV cache of fixed size costs: KL to the model with its whole cache, at the end of a long text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..core.files import read_text
from ..evaluation.kv_cache import KVCache
from ..kv.policies import make
from ..kv.settings import KvBudget
from ..kv.steps import most_held
from ..modeling.blocks import Decoder
from ..modeling.geometry import geometry_of
from ..modeling.types import CausalModel, ModelTokenizer
from ..records.fit import FitBudget

POLICY = "recent"  # needs no trained heads; retaining heads lose less
SHARES = (2, 4, 8)  # parts of the context that are kept
TAIL = 128  # tokens at the end of each text that KL is measured on
TEXTS = 2


def settings_of(entries: int, tail: int) -> KvBudget:
    """A budget whose other numbers fit it."""
    return KvBudget(
        entries, chunk=min(256, entries), stabilizers=min(64, entries), local=min(100, entries, tail), policy=POLICY
    )


def long_texts(text: Path, tokenizer: ModelTokenizer, context: int) -> list[list[int]]:
    """Texts of `context` tokens from a file, as many as are used; none where it is shorter."""
    ids = list(tokenizer(read_text(text), add_special_tokens=False, verbose=False)["input_ids"])
    return [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)][:TEXTS]


@torch.no_grad()
def budget_cost(model: CausalModel, texts: Sequence[Sequence[int]], entries: int) -> FitBudget:
    """KL (nats per token) of the last tokens of each text with so many entries per block and head, and its cache's
    bytes in half precision when most are held."""
    decoder, length = Decoder(model), len(texts[0])
    tail = min(TAIL, length // 4)
    settings = settings_of(entries, tail)
    total = 0.0
    for ids in texts:
        whole, kept = (_tail_logs(decoder, each, ids, tail) for each in (KvBudget(None, policy=POLICY), settings))
        total += float((whole.exp() * (whole - kept)).sum(-1).mean())
    held = min(most_held(settings, length - tail, tail), length)
    numbers = _numbers_per_entry(model)
    return FitBudget(entries=entries, bytes=2 * numbers * held, kl=max(total / len(texts), 0.0))


def _tail_logs(decoder: Decoder, settings: KvBudget, ids: Sequence[int], tail: int) -> torch.Tensor:
    """Log-probabilities (tail, V) of what follows each of the last tokens but the last one's own successor."""
    prompt = len(ids) - tail
    cache = KVCache(decoder, make(settings), settings, prompt, tail)
    first = cache.read_prompt(ids[:prompt])
    rest = cache.read_on(ids[prompt:-1])
    return torch.cat([first[None], rest]).double().log_softmax(-1)


def _numbers_per_entry(model: CausalModel) -> int:
    return geometry_of(model.config.to_dict()).kv_bytes(1, 1)
