"""Arithmetic of each stage, and what it has to read.

Counted are the matrix products (2 operations per weight and token) and attention (4 × heads × head size per pair of
tokens). Training takes 6 per weight: 2 forward, 2 backward through it, 2 for its own gradient, which frozen weights do
not have; the anchor's forward 2 per weight of the unpruned model. Decoding has to read all weights for every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...data.config import DatasetConfig, DatasetsConfig, MagpieConfig
from ...distill.config import DistillConfig
from ...merge.config import MergeConfig
from ...retain.config import SPREAD, RetainConfig, measured_after
from ...sort.config import SortConfig
from ...training.config import Cached, Full, TrainingConfig
from .devices import Work
from .measuring import evaluate_work, export_work, merge_work
from .memory import TEMPLATE, Setting, head_parameters
from .pruning import prune_work
from .writing import forward, writing_work


@dataclass(frozen=True)
class Rows:
    """The rows a recipe's data stage leaves; `tokens` counts them all, training and held out."""

    tokens: int
    heldout: float


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
        return prune_work(section, at)
    if isinstance(section, TrainingConfig):
        return _students(section, at, rows)
    if isinstance(section, RetainConfig):
        return _retain(section, at)
    if isinstance(section, MergeConfig):
        return merge_work(section, at, at.variants, rows.tokens * rows.heldout) if rows else None
    return export_work(section, at) if stage == "export" else evaluate_work(section, at)


def _data(config: Any, at: Setting) -> Work | None:
    rows = rows_of(config)
    if rows is None:
        return None
    looking = Work()
    if config.teacher is not None:
        looking = Work(forward(at.shape, at.shape.blocks, rows.tokens, config.length / 2))
    return looking + writing_work(config, at)


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
    if config.objective.needs_teacher and not isinstance(config.teacher, Cached):
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
