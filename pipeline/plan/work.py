"""Arithmetic of each stage, and its time on a named device.

Counted are the matrix products (2 operations per weight and token) and attention (4 × heads × head size per pair of
tokens). Training takes 6 per weight: 2 forward, 2 backward through it, 2 for its own gradient, which frozen weights do
not have; the anchor's forward 2 per weight of the unpruned model. Decoding has to read all weights for every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...data.config import DatasetConfig, DatasetsConfig, MagpieConfig
from ...distill.config import Cached, DistillConfig, Full, TrainingConfig, needs_teacher
from ...distill.retaining.config import SPREAD, RetainConfig, measured_after
from ...distill.sorted.config import SortConfig
from ...evaluation.config import EvaluateConfig, RetrievalConfig
from ...export.config import ExportConfig
from ...prune.config import PruneConfig
from .geometry import Geometry
from .memory import EXPORT_BITS, TEMPLATE, Setting, head_parameters


@dataclass(frozen=True)
class Work:
    """Operations, and bytes that are read anew for steps too small to keep the processor busy."""

    flops: float = 0.0
    read: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.read + other.read)


@dataclass(frozen=True)
class Rows:
    """The rows a recipe's data stage leaves; `tokens` counts them all, training and held out."""

    tokens: int
    heldout: float


def forward(shape: Geometry, blocks: int, tokens: float, context: float, heads: float | None = None) -> float:
    """Operations of a forward pass over `tokens` tokens that see `context` others on average.

    `heads`: positions whose logits are computed; all of them if not given.
    """
    weights = blocks * shape.block_products
    attention = 4 * blocks * shape.heads * shape.head_size * context
    logits = 2 * shape.vocab * shape.hidden * (tokens if heads is None else heads)
    return tokens * (2 * weights + attention) + logits


def decoding(at: Setting, blocks: int, rows: int, batch: int, prompt: int, new: int, weights: float) -> Work:
    """Writing `new` tokens after `prompt` tokens, for `rows` rows, `batch` at once."""
    flops = forward(at.shape, blocks, rows * prompt, prompt / 2, rows)
    flops += forward(at.shape, blocks, rows * new, prompt + new / 2)
    return Work(flops, math.ceil(rows / batch) * new * weights)


def rows_of(config: Any) -> Rows | None:
    """What a data stage leaves, if every row is as long as it may be; None where the number of rows is not known."""
    if config is None or config.rows is None:
        return None
    if isinstance(config, MagpieConfig):
        longest = min(config.length, TEMPLATE + config.max_prompt_tokens + config.max_tokens)
    else:
        longest = config.length if isinstance(config, (DatasetConfig, DatasetsConfig)) else config.tokens
    return Rows(config.rows * longest, config.heldout)


def heldout_targets(config: Any) -> int | None:
    """Tokens to measure on in a data stage's held-out rows, at most; None where the number of rows is not known."""
    if config is None or config.rows is None:
        return None
    longest = config.max_tokens if isinstance(config, MagpieConfig) else config.length
    return max(1, round(config.rows * config.heldout)) * longest


def stage_work(stage: str, section: Any, at: Setting, rows: Rows | None) -> Work | None:
    """One stage's work; None where it cannot be told from the recipe."""
    if stage == "data":
        return _data(section, at)
    if stage == "prune":
        return _prune(section, at)
    if isinstance(section, TrainingConfig):
        return _students(section, at, rows)
    if isinstance(section, RetainConfig):
        return _retain(section, at)
    return _export(section, at) if stage == "export" else _evaluate(section, at) if stage == "evaluate" else None


def _data(config: Any, at: Setting) -> Work | None:
    blocks, rows = at.shape.blocks, rows_of(config)
    if rows is None:
        return None
    looking = Work()
    if config.teacher is not None:
        looking = Work(forward(at.shape, blocks, rows.tokens, config.length / 2))
    if isinstance(config, (DatasetConfig, DatasetsConfig)):
        kinds = [part.rewrite for part in config.parts if part.rewrite is not None]
        if not kinds:
            return looking
        new = max(kind.max_tokens for kind in kinds)  # and every row rewritten
        return looking + decoding(at, blocks, config.rows or 0, config.batch, config.length, new, at.whole)
    if isinstance(config, MagpieConfig):
        prompts = decoding(at, blocks, config.rows, config.batch, TEMPLATE, config.max_prompt_tokens, at.whole)
        before = TEMPLATE + config.max_prompt_tokens
        return looking + prompts + decoding(at, blocks, config.rows, config.batch, before, config.max_tokens, at.whole)
    return looking + decoding(at, blocks, config.rows, config.batch, 1, config.tokens, at.whole)


def _prune(config: PruneConfig, at: Setting) -> Work | None:
    if config.splits or config.importance in ("perplexity", "kl", "taylor"):
        return None  # what a search tries depends on what it finds
    passes = 1 if config.heal.kind == "none" else 2
    tokens, half = config.calibration.tokens, config.calibration.length / 2
    return Work(passes * forward(at.shape, at.shape.blocks, tokens, half, 0))


def _students(config: TrainingConfig, at: Setting, rows: Rows | None) -> Work | None:
    if rows is None:
        return None
    variants = config.variants if isinstance(config, DistillConfig) else None
    shares = [end - start for start, end in (v.rows for v in variants)] if variants else [1.0]
    flops, half = 0.0, config.length / 2
    teacher = forward(at.shape, at.shape.blocks, 1, half)
    held = rows.tokens * rows.heldout
    for student, share in zip(config.students, shares, strict=True):
        flops += _training(student, at, rows.tokens * (1 - rows.heldout) * share, held, teacher)
    return Work(flops + held * teacher)


def _training(config: TrainingConfig, at: Setting, train: float, held: float, teacher: float) -> float:
    """Operations of one student's steps and measurements."""
    per_step = config.batch * config.length * config.accumulate
    steps = config.max_steps or max(1, math.ceil(config.epochs * train / per_step))
    student = forward(at.shape, at.kept, 1, config.length / 2, config.passes)
    factor = 3 if isinstance(config.tune, Full) else 2  # forward and backward; the weights' own gradients
    factor += config.gradient_checkpointing
    flops = steps * per_step * student * factor
    if needs_teacher(config.objective) and not isinstance(config.teacher, Cached):
        flops += steps * per_step * teacher
    heads = len(config.depths) if isinstance(config, SortConfig) else 1
    measured = forward(at.shape, at.kept, held, config.length / 2, held * heads)
    return flops + measured * (1 + math.ceil(steps / config.eval_every))


def _retain(config: RetainConfig, at: Setting) -> Work | None:
    """Rows whose lengths are spread evenly on a scale of ratios, held-out ones like them, which are read twice, and the
    heads' steps."""
    if config.dataset is not None:
        return None  # as long as they are
    longest = config.longest(at.shape.positions)
    mean = longest * (1 - 1 / SPREAD) / math.log(SPREAD)
    seen = longest * (1 + 1 / SPREAD) / 4  # on average by a token
    heads = head_parameters(config, at)[1]
    held = config.heldout * min(config.tokens, mean) * len(measured_after(config))
    flops = forward(at.shape, at.kept, mean * (config.rows + 2 * config.heldout), seen, 0)
    return Work(flops + heads * (config.steps * config.batch * 6 + held * 2))


def _export(config: ExportConfig, at: Setting) -> Work:
    small = at.shape.parameters(at.kept)
    tokens = config.imatrix_tokens + config.verify.tokens
    work = Work(forward(at.shape, at.kept, tokens, 256))
    for kind in [*config.gguf, *config.onnx]:
        work = work + Work(0, 4 * small * 4)  # writing and reading back touch every weight a few times
        for depth in at.exported(config):
            weights = at.shape.parameters(depth) * EXPORT_BITS[kind] / 8
            # llama.cpp is asked position by position.
            steps = config.verify.tokens if kind in config.gguf else 1
            scored = forward(at.shape, depth, config.verify.tokens, config.verify.window / 2)
            work = work + Work(scored, steps * weights)
    return work


def _evaluate(config: EvaluateConfig, at: Setting) -> Work:
    half = config.window / 2
    work = Work()
    # base, pruned, healed and recovered; of a sorted model the lesser depths
    for blocks in (at.shape.blocks, at.kept, at.kept, at.kept, *at.sorted[:-1]):
        weights = at.shape.parameters(blocks) * at.size
        work = work + Work(forward(at.shape, blocks, config.tokens, half))
        if config.speed:
            new = config.speed.new_tokens * (config.speed.repeat + 1)
            work = work + decoding(at, blocks, 1, 1, config.speed.prompt_tokens, new, weights)
    return work + _retrieval(config.retrieval, at) if config.retrieval else work


def _retrieval(config: RetrievalConfig, at: Setting) -> Work:
    """Long prompts, read once by each policy at each budget; questions about one text share most of it."""
    work = Work()
    texts = config.rows * sum(len(config.depths) if task == "passkey" else 1 for task in config.tasks)
    for length in config.lengths:
        for policy in config.policies:
            for budget in [length] if policy == "full" else [config.entries(b, length) for b in config.budgets]:
                keys = min(budget, length / 2)
                work = work + Work(texts * forward(at.shape, at.kept, length, keys, heads=1))
    return work
