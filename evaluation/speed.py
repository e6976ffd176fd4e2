"""Tokens per second of a checkpoint in torch."""

from __future__ import annotations

import time

import torch

from ..modeling.blocks import Decoder
from ..modeling.types import CausalModel
from .config import SpeedTest


@torch.no_grad()
def torch_speed(model: CausalModel, test: SpeedTest) -> dict[str, float]:
    """Prefill and decode tokens per second of one stream, greedy, with a KV cache; the best of the repetitions."""
    decoder = Decoder(model)
    ids = torch.tensor([[3 + i % 89 for i in range(test.prompt_tokens)]], device=model.device)
    best = {"prefill_tokens_per_second": 0.0, "tokens_per_second": 0.0}
    for turn in range(test.repeat + 1):  # the first turn warms up
        start = _now(model)
        out = model.model(input_ids=ids, use_cache=True)
        token = decoder.head(out.last_hidden_state[:, -1:]).argmax(-1)
        middle = _now(model)
        for _ in range(test.new_tokens if turn else 2):
            out = model.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = decoder.head(out.last_hidden_state).argmax(-1)
        end = _now(model)
        if turn:
            best["prefill_tokens_per_second"] = max(
                best["prefill_tokens_per_second"], test.prompt_tokens / (middle - start)
            )
            best["tokens_per_second"] = max(best["tokens_per_second"], test.new_tokens / (end - middle))
    return best


def _now(model: CausalModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
