"""Cost of the data stage: the unpruned model generates text with any engine, and scores it for the teacher cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.cost import BYTES, CUDA_CONTEXT, Need, Overrides, Parts, RowCounts, Setting, StageCost, halves, worst
from ..core.work import Work, batches, decoding, forward
from ..runtime.artifact_types import GGUF_TYPES
from .config import (
    DataConfig,
    DrillsConfig,
    LlamaCppSettings,
    MagpieConfig,
    ProseConfig,
    RowsFromData,
    TextsConfig,
    VllmSettings,
    WrittenConfig,
)

RUNTIME = 585e6  # measured with a tiny model on Linux, torch 2.13 for CPUs
TEMPLATE = 32  # tokens a chat template adds around a turn
ASKED = 128  # tokens of the instructions in a rewriting prompt
DRILL_TOKENS, DRILL_LONGEST, DRILL_LEARNED = 145, 210, 29  # of a row of four exercises; measured with SmolLM2
CHUNK = 256  # positions per logits chunk when the teacher cache is written
WEIGHT_BITS = GGUF_TYPES["Q8_0"].most  # assumed maximum for a GGUF file that generates text
LLAMACPP_ROWS, VLLM_ROWS = 8, 256  # maximum rows generated at once
VLLM_BLOCK = 128  # tokens by which vLLM's cache grows on a CPU
VLLM_OTHER = 1.5e9  # assumed: vLLM's GPU memory besides weights and cache


def target_arrays(k: int, vocabulary: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The teacher cache's arrays: shape and dtype of the entry for one trained token."""
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        "positions": ((), np.int32),
        "targets": ((), np.int32),
        "tokens": ((k,), np.uint16 if vocabulary <= 1 << 16 else np.int32),
        "log_probs": ((k + 1,), np.float16),
    }
    return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}


def rows_of(config: DataConfig) -> RowCounts | None:
    """The rows of a data stage; None if their number is unknown."""
    if isinstance(config, DrillsConfig):
        held = max(1, round(config.rows * config.heldout))
        learned, targets = (round(count * DRILL_LEARNED) for count in (config.rows - held, held))
        return _drill_rows(learned, targets, config.length)
    if isinstance(config, ProseConfig):
        train, held = prose_goals(config)
        own = _prose_rows(train, held, config.length)
    else:
        own = own_rows_of(config)
    if own is None:
        return None
    found = [own]
    if not isinstance(config, ProseConfig) and config.prose is not None:
        found.append(_prose_rows(*_beside(own, config.prose.weight), config.length))
    if config.drills is not None:
        found.append(_drill_rows(*_beside(own, config.drills.weight), config.length))
    return _together(found)


def _beside(own: RowCounts, weight: float) -> tuple[int, int]:
    """Tokens to learn and to hold out beside a source's own rows."""
    return math.ceil(weight * own.learned), math.ceil(weight * own.targets)


def _together(parts: Sequence[RowCounts]) -> RowCounts:
    tokens = sum(part.tokens for part in parts)
    return RowCounts(
        sum(part.count for part in parts),
        tokens,
        sum(part.tokens * part.heldout for part in parts) / tokens,
        sum(part.targets for part in parts),
        sum(part.learned for part in parts),
        max(part.longest for part in parts),
    )


def own_rows_of(config: WrittenConfig) -> RowCounts | None:
    """The same without the prose beside them."""
    if config.rows is None:
        return None
    longest, targets = config.length, config.length
    if isinstance(config, MagpieConfig):
        longest = min(config.length, TEMPLATE + config.max_prompt_tokens + config.max_tokens)
        targets = config.max_tokens
    elif isinstance(config, TextsConfig):
        longest = targets = config.tokens
    held = max(1, round(config.rows * config.heldout))
    learned = (config.rows - held) * targets
    return RowCounts(config.rows, config.rows * longest, config.heldout, held * targets, learned, longest)


def prose_goals(config: ProseConfig) -> tuple[int, int]:
    """Tokens to learn and tokens to hold out."""
    held = min(max(1, round(config.tokens * config.heldout)), config.tokens - 1)
    return config.tokens - held, held


def _prose_rows(train: int, held: int, length: int) -> RowCounts:
    """Rows of full length; the first token of each is not learned."""
    count = max(2, math.ceil((train + held) / (length - 1)))
    return RowCounts(count, train + held + count, held / (train + held), held, train, length)


def _drill_rows(train: int, held: int, length: int) -> RowCounts:
    """Rows of the mean size of drills."""
    count = max(2, math.ceil((train + held) / DRILL_LEARNED))
    tokens, longest = count * min(DRILL_TOKENS, length), min(DRILL_LONGEST, length)
    return RowCounts(count, tokens, held / (train + held), held, train, longest)


def _leaves(config: DataConfig, at: Setting) -> Setting:
    return replace(at, rows=rows_of(config))


def _need(config: DataConfig, at: Setting) -> Need:
    """Generating rows (the unpruned model's weights and the KV cache of a whole batch), then the teacher cache."""
    shape, runtime, rows = at.shape, {"runtime": at.runtime(RUNTIME)}, rows_of(config)
    writing, note, host = _writing(config, at)
    if config.teacher is None:
        return Need(worst(runtime | writing), 0, note, host=host)
    arrays = target_arrays(min(config.teacher.top_k, shape.vocab), shape.vocab).values()
    per_target = sum(kind.itemsize * (part[0] if part else 1) for part, kind in arrays)
    looking = runtime | {
        "weights": at.whole,
        "activations": config.teacher.batch * config.length * shape.state * at.size,
        "logits": CHUNK * shape.vocab * 4 * 3,
    }
    note += f"; teacher: {per_target} bytes per learned token"
    disk = (rows.learned + rows.targets) * per_target if rows else 0  # at most
    return Need(worst(runtime | writing, looking), disk, note, host=host)


def _sampling(at: Setting, rows: int, tokens: int, size: int | None = None) -> Parts:
    # Logits, probabilities (4 bytes each) and their float64 cumulative sums.
    kv = at.shape.kv_bytes(rows * tokens, size or at.size)
    return {"kv": kv, "logits": rows * at.shape.vocab * (4 + 4 + 8)}


@dataclass(frozen=True)
class Text:
    """One text generated for every row: maximum prompt tokens and maximum new tokens."""

    prompt: int
    new: int
    times: int = 1  # for each row

    @property
    def tokens(self) -> int:
        return self.prompt + self.new


def _texts(config: DataConfig) -> list[Text]:
    """The texts generated per row; none for real text, and if gold is kept unchanged."""
    if isinstance(config, ProseConfig | DrillsConfig):
        return []
    if isinstance(config, MagpieConfig):
        prompt = TEMPLATE + config.max_prompt_tokens
        return [Text(TEMPLATE, config.max_prompt_tokens), Text(prompt, config.max_tokens)]
    if isinstance(config, TextsConfig):
        return [Text(1, config.tokens)]
    kinds = [part.rewrite for part in config.parts if part.rewrite is not None]
    if not kinds:
        return []
    # The prompt holds the row and the instructions. With own_answer_first, every first answer may be rejected.
    times = 2 if any(kind.own_answer_first for kind in kinds) else 1
    return [Text(config.length + ASKED, max(kind.max_tokens for kind in kinds), times)]


def _writing(config: DataConfig, at: Setting) -> tuple[Parts, str, int]:
    """Parts on the device, a note for the plan, and bytes of the machine's own memory."""
    if isinstance(config, DrillsConfig):
        return {}, "drills, nothing is written", 0
    drills = "" if config.drills is None else "drills and "
    if isinstance(config, ProseConfig):
        return {}, f"{drills}real text, nothing is written", 0
    note, verb = drills, "written"
    if config.prose is not None:
        note += "real text and "
    if isinstance(config, RowsFromData):
        note += "rows of a data set, " if len(config.parts) == 1 else f"rows of {len(config.parts)} data sets, "
        verb = "rewritten"
    texts, engine = _texts(config), config.engine
    if not texts:
        return {}, note.removesuffix(", "), 0
    tokens = max(text.tokens for text in texts)
    if isinstance(engine, VllmSettings):
        gpus = f" on {engine.gpus} GPUs" if engine.gpus > 1 else ""
        return _vllm(config.batch, engine, at, tokens), f"{note}{verb} by vllm{gpus}", 0
    note += f"{config.batch} {verb} at once by {engine.kind}"
    if isinstance(engine, LlamaCppSettings):  # a cache in float16; beside a GPU
        rows = min(config.batch, LLAMACPP_ROWS)
        weights = int(at.shape.parameters(at.shape.blocks) * WEIGHT_BITS / 8)
        held = {"weights": weights} | _sampling(at, rows, tokens, BYTES["float16"])
        return ({}, note, sum(held.values())) if at.cuda else (held, note, 0)
    return {"weights": at.whole} | _sampling(at, config.batch, tokens), note, 0


def _vllm(batch: int, engine: VllmSettings, at: Setting, tokens: int) -> Parts:
    """For one GPU: its shard of the weights, and a cache that fills the share vLLM may use and must hold at least one
    row. On a CPU the cache is as large as the rows need."""
    shape, weights = at.shape, at.whole // engine.gpus
    if not at.cuda:
        kv = shape.kv_bytes(min(batch, VLLM_ROWS) * (tokens + VLLM_BLOCK), at.size)
        return {"weights": at.whole, "kv": kv}
    other, row = int(VLLM_OTHER), shape.kv_bytes(tokens, at.size) // engine.gpus
    share = engine.memory * (at.room if at.room is not None else 0)
    held = weights + other + at.runtime(RUNTIME)
    kv = int(share) - held
    if kv < row and at.room is not None:  # too small: the memory that would make the share large enough
        kv = int((held + row) / engine.memory) - held
    return {"weights": weights, "kv": max(kv, row), "other": other}


def _work(config: DataConfig, at: Setting) -> Work | None:
    rows = rows_of(config)
    if rows is None:
        return None
    looking = Work()
    if config.teacher is not None:
        looking = Work(forward(at.shape, at.shape.blocks, rows.tokens, config.length / 2))
    return looking + _writing_work(config, at)


def _writing_work(config: DataConfig, at: Setting) -> Work:
    """Generating the text of `config.rows` rows, each of maximum length."""
    total = Work()
    if isinstance(config, ProseConfig | DrillsConfig):
        return total
    for text in _texts(config):
        total += _engine_work(config, text, at)
    return total


def _engine_work(config: WrittenConfig, text: Text, at: Setting) -> Work:
    shape, blocks, engine, rows = at.shape, at.shape.blocks, config.engine, (config.rows or 0) * text.times
    if not rows:
        return Work()
    if isinstance(engine, LlamaCppSettings):
        weights = shape.parameters(blocks) * WEIGHT_BITS / 8
        together = min(config.batch, LLAMACPP_ROWS)
        return decoding(shape, blocks, rows, together, text.prompt, text.new, weights, BYTES["float16"]).beside()
    together = vllm_rows(config, engine, at) if isinstance(engine, VllmSettings) else batches(rows, config.batch)
    work = decoding(shape, blocks, rows, together, text.prompt, text.new, at.whole, at.size)
    gpus = engine.gpus if isinstance(engine, VllmSettings) else 1
    return Work(work.flops / gpus, work.read / gpus)


def vllm_rows(config: WrittenConfig, engine: VllmSettings, at: Setting) -> int:
    """Rows that vLLM batches: as many half-written rows as fit into its cache, at most `batch`."""
    most = min(config.batch, VLLM_ROWS)
    if not at.cuda or at.room is None:
        return most
    row = at.shape.kv_bytes(round(max(text.prompt + text.new / 2 for text in _texts(config))), at.size)
    room = engine.gpus * (engine.memory * at.room - CUDA_CONTEXT - VLLM_OTHER) - at.whole
    return max(1, min(most, int(room / row)))


def _changes(config: DataConfig, _at: Setting) -> Iterable[Overrides]:
    if isinstance(config, ProseConfig | DrillsConfig):
        return ()
    return ((f"data.batch={size}",) for size in halves(config.batch, 1))


def _cards(config: DataConfig, cards: int) -> int:
    """GPUs in use: one if no text is generated; one with llama.cpp, which runs on the CPU, and with vLLM that already
    spans several."""
    if isinstance(config, ProseConfig | DrillsConfig):
        return 1
    engine = config.engine
    alone = isinstance(engine, LlamaCppSettings) or (isinstance(engine, VllmSettings) and engine.gpus > 1)
    return 1 if alone or not _texts(config) else cards


COST = StageCost[DataConfig](_need, _work, _leaves, _changes, _cards)
