"""What it takes to have a model write text, by whatever engine writes it."""

from __future__ import annotations

import math
from typing import Any

from ...data.config import DatasetConfig, DatasetsConfig, LlamaCppEngine, MagpieConfig, VllmEngine
from .devices import Work
from .geometry import Geometry
from .memory import BYTES, CUDA_CONTEXT, GGUF_BITS, LLAMACPP_ROWS, TEMPLATE, VLLM_OTHER, VLLM_ROWS, Setting

ASKED = 128  # tokens of what is asked for beside a row that is to be rewritten


def forward(shape: Geometry, blocks: float, tokens: float, context: float, heads: float | None = None) -> float:
    """Operations of a forward pass over `tokens` tokens that see `context` others on average.

    `heads`: positions whose logits are computed; all of them if not given.
    """
    weights = blocks * shape.block_products
    attention = 4 * blocks * shape.heads * shape.head_size * context
    logits = 2 * shape.vocab * shape.hidden * (tokens if heads is None else heads)
    return tokens * (2 * weights + attention) + logits


def decoding(
    at: Setting, blocks: int, rows: int, together: float, prompt: int, new: int, weights: float, size: int | None = None
) -> Work:
    """Writing `new` tokens after `prompt` tokens, for `rows` rows, `together` at once.

    Every step reads the weights (bytes) and, of each row, the keys and values of `size` bytes a number.
    """
    flops = forward(at.shape, blocks, rows * prompt, prompt / 2, rows)
    flops += forward(at.shape, blocks, rows * new, prompt + new / 2)
    cache = rows * new * (prompt + new / 2) * at.shape.kv_bytes(1, size or at.size, blocks)
    return Work(flops, max(1.0, rows / together) * new * weights + cache)


def batches(rows: int, batch: int) -> float:
    """How many rows are together on average where the last batch may be smaller."""
    return rows / math.ceil(rows / batch)


def writing_work(config: Any, at: Setting) -> Work:
    """The text of a data stage that has as many rows as `config.rows` says; nothing where gold is taken as it is."""
    blocks = at.shape.blocks
    if isinstance(config, (DatasetConfig, DatasetsConfig)):
        return _rewriting(config, at)
    together = batches(config.rows, config.batch)
    if isinstance(config, MagpieConfig):
        before = TEMPLATE + config.max_prompt_tokens
        prompts = decoding(at, blocks, config.rows, together, TEMPLATE, config.max_prompt_tokens, at.whole)
        return prompts + decoding(at, blocks, config.rows, together, before, config.max_tokens, at.whole)
    return decoding(at, blocks, config.rows, together, 1, config.tokens, at.whole)


def _rewriting(config: DatasetConfig | DatasetsConfig, at: Setting) -> Work:
    """Every row rewritten, as long as it may be; where the model answers first, and all of these answers are wrong."""
    kinds = [part.rewrite for part in config.parts if part.rewrite is not None]
    rows, new = config.rows or 0, max((kind.max_tokens for kind in kinds), default=0)
    if not kinds or not rows:
        return Work()
    rows *= 2 if any(kind.own_answer_first for kind in kinds) else 1
    prompt, blocks, engine = config.length + ASKED, at.shape.blocks, config.engine
    if isinstance(engine, LlamaCppEngine):
        weights = at.shape.parameters(blocks) * GGUF_BITS / 8
        return decoding(at, blocks, rows, min(config.batch, LLAMACPP_ROWS), prompt, new, weights, 2).beside()
    if isinstance(engine, VllmEngine):
        found = decoding(at, blocks, rows, vllm_rows(config, engine, at), prompt, new, at.whole)
        return Work(found.flops / engine.gpus, found.read / engine.gpus)
    return decoding(at, blocks, rows, batches(rows, config.batch), prompt, new, at.whole)


def vllm_rows(config: DatasetConfig | DatasetsConfig, engine: VllmEngine, at: Setting) -> int:
    """Rows that vLLM computes together: as many as its cache has room for, each half written, and `batch` gives it."""
    most = min(config.batch, VLLM_ROWS)
    if not at.cuda or at.room is None:
        return most
    new = max(part.rewrite.max_tokens for part in config.parts if part.rewrite is not None)
    row = at.shape.kv_bytes(round(config.length + ASKED + new / 2), BYTES[at.dtype])
    room = engine.gpus * (engine.memory * at.room - CUDA_CONTEXT - VLLM_OTHER) - at.whole
    return max(1, min(most, int(room / row)))
